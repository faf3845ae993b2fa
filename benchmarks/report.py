"""What a run looks like: a table on the terminal, CSV, PNG, one HTML page, and the README's table from the committed JSON."""

from __future__ import annotations

import base64
import csv
import html
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
PEERS = ("eager", "compiled", "sdpa", "flex", "segments", "composed", "padded")
Run = dict[str, Any]


def timed(run: Run) -> list[dict[str, Any]]:
    return [row for row in run["rows"] if "ms" in row]


def peers_of(run: Run) -> list[str]:
    seen = {name for row in timed(run) for name in row["ratio"]}
    return [name for name in PEERS if name in seen] + sorted(seen - set(PEERS))


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def milliseconds(value: float) -> str:
    return f"{value:.3g}"


def print_table(run: Run, console: Console) -> None:
    names = peers_of(run)
    table = Table("op", "shape", "dtype", "pass", "backend", "ms", "p20–p80", *names, "% of floor", "extra")
    for row in run["rows"]:
        head = (row["op"], row["shape"], row["dtype"], row.get("pass", ""))
        if "ms" not in row:
            table.add_row(*head, f"[yellow]{row.get('skipped') or row.get('error')}[/]")
            continue
        ms = row["ms"]
        ratios = [_coloured(row["ratio"].get(name)) for name in names]
        span = f"{milliseconds(ms['p20'])}–{milliseconds(ms['p80'])}"
        extra = f"{row['extra_bytes'] / max(row['input_output_bytes'], 1):.2f}"
        share = f"{100 * row['share_of_floor']:.0f}"
        table.add_row(*head, row["backend"], milliseconds(ms["median"]), span, *ratios, share, extra)
    console.print(table)
    console.print(
        "Peers: how many times longer they take; below 1 we lose. extra: peak beyond inputs, in inputs + outputs."
    )
    busy = [row["others_cores"] for row in timed(run) if row["loaded"]]
    if busy:
        console.print(
            f"[yellow]Others took up to {max(busy):.1f} cores during {len(busy)} rows: do not quote those.[/]"
        )


def _coloured(value: float | None) -> str:
    return "" if value is None else f"[{'green' if value >= 1 else 'red'}]{times(value)}[/]"


def write(run: Run, folder: Path) -> list[Path]:
    """JSON, CSV, PNG and HTML of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"bench.{suffix}" for suffix in ("json", "csv", "png", "html")]
    files[0].write_text(json.dumps(run, indent=1) + "\n")
    _write_csv(run, files[1])
    if timed(run):
        _plot(run, files[2])
        _write_html(run, files[2], files[3])
    return [file for file in files if file.is_file()]


def _write_csv(run: Run, file: Path) -> None:
    names = peers_of(run)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(
            ("op", "shape", "dtype", "pass", "backend", "median_ms", "p20_ms", "p80_ms", "floor_ms", *names)
        )
        for row in timed(run):
            ms, head = row["ms"], [row[key] for key in ("op", "shape", "dtype", "pass", "backend")]
            ratios = [f"{row['ratio'][name]:.3f}" if name in row["ratio"] else "" for name in names]
            writer.writerow(
                [
                    *head,
                    *(f"{ms[key]:.4f}" for key in ("median", "p20", "p80")),
                    f"{row['floor_ms']:.4f}",
                    *ratios,
                ]
            )


def _plot(run: Run, file: Path) -> None:
    """Ratios to every peer on a log axis with 1 marked, losses in the same picture, and the share of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, names = timed(run), peers_of(run)
    labels = [f"{r['shape']}  {r['dtype'].replace('float', 'f')}  {r['pass']}" for r in rows]
    height = 1.2 + 0.34 * len(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), sharey=True, width_ratios=(3, 1))
    colours = pyplot.get_cmap("tab10")
    for n, name in enumerate(names):
        points = [(r["ratio"][name], y) for y, r in enumerate(rows) if name in r["ratio"]]
        left.scatter(*zip(*points, strict=True), s=42, color=colours(n), label=name, zorder=3)
    left.axvline(1, color="0.3", linewidth=1)
    left.set(
        xscale="log",
        xlabel="times longer than ours (left of 1: we lose)",
        yticks=range(len(rows)),
        yticklabels=labels,
    )
    left.invert_yaxis()
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1 + 0.9 / height), ncols=len(names), frameon=False)
    right.barh(range(len(rows)), [100 * r["share_of_floor"] for r in rows], color="#2563eb", height=0.6)
    right.set(xlabel="% of the floor of this machine", xlim=(0, 100))
    for axis in (left, right):
        axis.grid(axis="x", color="0.9", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _write_html(run: Run, picture: Path, file: Path) -> None:
    image = base64.b64encode(picture.read_bytes()).decode()
    about = html.escape(
        json.dumps({key: run[key] for key in ("device", "rates", "date", "versions", "git")}, indent=1)
    )
    file.write_text(
        "<!doctype html><meta charset=utf-8><title>mmkernels bench</title>"
        "<style>body{font:15px/1.5 system-ui;margin:2rem auto;max-width:1200px;color:#1f2937}img{max-width:100%}"
        "td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #eee}td:nth-child(-n+4){text-align:left}</style>"
        f"<h1>mmkernels bench</h1><img src='data:image/png;base64,{image}'>"
        f"<table>{_html_rows(run)}</table><pre>{about}</pre>"
    )


def _html_rows(run: Run) -> str:
    names = peers_of(run)
    head = "".join(f"<th>{n}</th>" for n in ("op", "shape", "dtype", "pass", "ms", *names, "% of floor"))
    lines = [head]
    for row in timed(run):
        cells = [row["op"], row["shape"], row["dtype"], row["pass"], milliseconds(row["ms"]["median"])]
        cells += [times(row["ratio"].get(name)) for name in names] + [f"{100 * row['share_of_floor']:.0f}"]
        lines.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
    return "".join(f"<tr>{line}</tr>" for line in lines)


def markdown(run: Run) -> str:
    """The README's table: every timed row, losses too, with device and versions above it."""
    names = peers_of(run)
    lines = [
        f"Measured on {run['device']}, torch {run['versions']['torch']}, revision {run['git']}, {run['date']}. Peers: how many "
        "times longer than ours they take, interleaved in one process; below 1 we lose.",
        "",
        "| op | shape | dtype | pass | backend | ms | " + " | ".join(names) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(names),
    ]
    for row in timed(run):
        ratios = " | ".join(times(row["ratio"].get(name)) for name in names)
        head = " | ".join(str(row[key]) for key in ("op", "shape", "dtype", "pass", "backend"))
        lines.append(f"| {head} | {milliseconds(row['ms']['median'])} | {ratios} |")
    return "\n".join(lines)


def readme(results: Path) -> None:
    """Rewrites the README's table from a committed JSON file."""
    file = ROOT / "README.md"
    before, rest = file.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    table = markdown(json.loads(results.read_text()))
    file.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    readme(Path(sys.argv[1]))
