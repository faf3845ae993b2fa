"""What a record looks like: tables on the terminal, JSON, CSV, and the README's table from the committed JSON.

`python -m benchmarks.report readme` rewrites the README between its markers.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT
from benchmarks.wanted import Row

RESULTS = ROOT / "benchmarks" / "results"
MARKERS = ("<!-- bench:begin -->", "<!-- bench:end -->")
ORDER = ("eager", "compiled", "sdpa", "flex", "padded", "segments", "composed", "varlen", "reference")
NOTES = (
    "A peer's column says how many times longer it takes than ours: the median over neighbouring runs in one process. "
    "Below 1 we lose.",
    "floor: the share of our time that this machine's best product and copy rates would take. extra: peak memory beyond "
    "inputs and outputs, in multiples of them. itself: ours against ours; read no ratio that is closer to 1 than that.",
)

Record = dict[str, Any]


def timed(record: Record) -> list[Row]:
    return [row for row in record["rows"] if "ms" in row]


def peers_of(rows: list[Row]) -> list[str]:
    """The peers that some row was timed against, the plainest first."""
    seen = {name for row in rows for name in row.get("ratio", ())}
    return [name for name in ORDER if name in seen] + sorted(seen - set(ORDER))


def best_peer(row: Row) -> str:
    """The peer that comes closest to us, or beats us."""
    return min(row["ratio"], key=row["ratio"].__getitem__, default="")


def losses(record: Record) -> list[tuple[Row, str]]:
    return [(row, name) for row in timed(record) for name, ratio in row["ratio"].items() if ratio < 1]


def times(value: float | None) -> str:
    """A ratio as people say it."""
    if value is None:
        return ""
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def extra(row: Row) -> str:
    if "extra_bytes" not in row:
        return ""
    return f"{row['extra_bytes'] / max(row['input_output_bytes'], 1):.2f}×"


def why_untimed(row: Row) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    return f"WRONG: {row['worst']} has {row['share_of_allowed_error']} times the allowed error"


def print_tables(record: Record, console: Console) -> None:
    console.print(about(record), highlight=False)
    for op, group in groupby(record["rows"], key=lambda row: row["op"]):
        rows = list(group)
        console.print(_table(op, rows))
        for why, untimed in groupby((row for row in rows if "ms" not in row), key=why_untimed):
            named = ", ".join(f"{row['shape']} {row['dtype']} {row['pass']}" for row in untimed)
            console.print(f"{named}: [{'yellow' if why.startswith('skipped') else 'bold red'}]{why}[/]")
    for note in (*NOTES, *warnings(record)):
        console.print(note, highlight=False)


def about(record: Record) -> str:
    rates = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in record["rates"].items())
    return f"{record['device']}; torch {record['versions']['torch']}; revision {record['git']}; {rates}"


def warnings(record: Record) -> Iterator[str]:
    lost = losses(record)
    if lost:
        yield f"Lost: {len(lost)} of {sum(len(row['ratio']) for row in timed(record))} ratios are below 1."
    if record["load"]["loaded"]:
        taken = record["load"]["others_cores"]
        yield f"LOADED MACHINE: others took {taken} cores in the median row. Do not quote these numbers."


def _table(op: str, rows: list[Row]) -> Table:
    names = peers_of(rows)
    table = Table(title=op, title_justify="left", title_style="bold")
    for name in ("shape", "dtype", "pass", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "p20–p80", *names, "itself", "floor", "extra"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "ms" not in row:
            continue
        head = (
            row["shape"],
            row["dtype"],
            row["pass"],
            row["backend"] + (" (loaded)" if row["loaded"] else ""),
        )
        ms, itself = row["ms"], row["itself"]
        ratios = [_coloured(row["ratio"].get(name)) for name in names]
        span = f"{milliseconds(ms['p20'])}–{milliseconds(ms['p80'])}"
        noise = f"{itself['p20']:.2f}–{itself['p80']:.2f}"
        share = f"{100 * row['share_of_floor']:.0f} %" if "share_of_floor" in row else ""
        table.add_row(*head, milliseconds(ms["median"]), span, *ratios, noise, share, extra(row))
    return table


def _coloured(value: float | None) -> str:
    return "" if value is None else f"[{'green' if value >= 1 else 'bold red'}]{times(value)}[/]"


def write_json(record: Record, file: Path) -> None:
    file.write_text(json.dumps(record, indent=1) + "\n")


def write_csv(record: Record, file: Path) -> None:
    """One line a row: ours, the floor, then every peer's median and its ratio with p20 and p80."""
    rows = timed(record)
    names, plain = peers_of(rows), ("op", "shape", "dtype", "pass", "backend")
    numbers = (
        "floor_ms",
        "share_of_floor",
        "flops",
        "bytes",
        "extra_bytes",
        "input_output_bytes",
        "others_cores",
    )
    parts = [f"{name}_{part}" for name in names for part in ("ms", "ratio", "ratio_p20", "ratio_p80")]
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow((*plain, "ms", "p20_ms", "p80_ms", *numbers, *parts))
        for row in rows:
            own = [row["ms"][key] for key in ("median", "p20", "p80")]
            peers = [value for name in names for value in _of_peer(row, name)]
            writer.writerow([*(row[key] for key in plain), *own, *(row.get(n, "") for n in numbers), *peers])


def _of_peer(row: Row, name: str) -> list[Any]:
    if name not in row["ratio"]:
        return [""] * 4
    return [row["peer_ms"][name]["median"], *(row[key][name] for key in ("ratio", "ratio_p20", "ratio_p80"))]


def markdown(record: Record, folder: str) -> str:
    """The README's table: the headline rows, each against eager and against the peer that comes closest."""
    rows = [row for row in timed(record) if row["headline"]]
    lost = losses(record)
    lines = [
        f"{record['device']}, torch {record['versions']['torch']}, revision {record['git']}, "
        f"{record['date'][:10]}. Ratios are a peer's time over ours, interleaved in one process"
        + (f", the median of {record['processes']} processes." if record["processes"] > 1 else "."),
        "",
        "| op | shape | dtype | pass | backend | ms | eager | closest peer | floor | extra memory |",
        "|---|---|---|---|---|--:|--:|--:|--:|--:|",
        *(_markdown_row(row) for row in rows),
        "",
        f"![Every headline row against every peer]({folder}/headline.png)",
        "",
        f"All {len(timed(record))} rows, with every peer, spread and memory: [table]({folder}/bench.csv), "
        f"[page]({folder}/bench.html), [plots]({folder}). "
        f"Lost: {len(lost)} of {sum(len(row['ratio']) for row in timed(record))} ratios are below 1"
        + (f" ({_named(lost)})." if lost else "."),
    ]
    return "\n".join(lines)


def _markdown_row(row: Row) -> str:
    best = best_peer(row)
    cells = (
        *(row[key] for key in ("op", "shape", "dtype", "pass", "backend")),
        milliseconds(row["ms"]["median"]),
        times(row["ratio"].get("eager")),
        f"{times(row['ratio'][best])} {best}" if best else "",
        f"{100 * row['share_of_floor']:.0f} %" if "share_of_floor" in row else "",
        extra(row),
    )
    return f"| {' | '.join(cells)} |"


def _named(lost: list[tuple[Row, str]]) -> str:
    worst = sorted(lost, key=lambda pair: pair[0]["ratio"][pair[1]])[:4]
    named = [f"{r['shape']} {r['dtype']} {r['pass']}: {times(r['ratio'][n])} {n}" for r, n in worst]
    return "; ".join(named) + ("; …" if len(lost) > len(worst) else "")


def readme(page: Path = ROOT / "README.md", results: Path = RESULTS) -> None:
    """Rewrites what stands between the README's markers from every committed record. **Raises** ValueError without markers."""
    files = sorted(results.glob("*/bench.json"))
    tables = [
        markdown(json.loads(f.read_text()), f.parent.relative_to(page.parent).as_posix()) for f in files
    ]
    text = page.read_text()
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise ValueError(f"{page}: expected the markers {MARKERS[0]} and {MARKERS[1]}")
    page.write_text("\n\n".join([before + begin, *tables, end + after]) if tables else text)


if __name__ == "__main__":
    if sys.argv[1:] != ["readme"]:
        sys.exit("usage: python -m benchmarks.report readme")
    readme()
