"""One HTML page that needs no other file: a table to filter, the pictures, and how it was measured."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from benchmarks.report import (
    NOTES,
    Record,
    best_peer,
    extra,
    milliseconds,
    peers_of,
    timed,
    times,
    warnings,
    why_untimed,
)
from benchmarks.wanted import Row

TEMPLATE = Path(__file__).with_name("page.html")
FILTERS = ("op", "dtype", "pass")


def write(record: Record, pictures: Iterable[Path], file: Path) -> None:
    names = peers_of(record["rows"])
    head = ("op", "shape", "dtype", "pass", "backend", "ms", *names, "floor", "extra")
    about = {key: value for key, value in record.items() if key != "rows"}
    page = Template(TEMPLATE.read_text()).substitute(
        device=escape(record["device"]),
        torch=escape(record["versions"]["torch"]),
        git=escape(record["git"]),
        date=escape(record["date"]),
        seconds=record["seconds"],
        warnings="".join(f'<p class="warning">{escape(text)}</p>' for text in warnings(record)),
        cards="".join(
            f"<div class=card><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in cards(record)
        ),
        filters="".join(_select(name, record["rows"]) for name in FILTERS),
        head="".join(f"<th>{escape(name)}</th>" for name in head),
        rows="".join(_row(row, names) for row in record["rows"]),
        figures="".join(_figure(picture) for picture in pictures),
        notes="".join(f"<p>{escape(note)}</p>" for note in NOTES),
        about=escape(json.dumps(about, indent=2)),
    )
    file.write_text(page)


def cards(record: Record) -> list[tuple[str, str]]:
    """The machine's rates, and the headline rows in a number each."""
    found = [(f"{value:g}", name.replace("_", " ")) for name, value in record["rates"].items()]
    for row in timed(record):
        closest = best_peer(row)
        if row["headline"] and row["dtype"] == "float32" and closest:
            title = f"{row['shape']}, {row['pass']}: over {closest}"
            found.append((times(row["ratio"][closest]), title))
    return found


def _select(name: str, rows: list[Row]) -> str:
    options = "".join(
        f"<option>{escape(value)}</option>" for value in dict.fromkeys(row[name] for row in rows)
    )
    return f'<select name="{name}"><option value="">every {name}</option>{options}</select>'


def _row(row: Row, names: list[str]) -> str:
    data = " ".join(f'data-{name}="{escape(row[name])}"' for name in FILTERS)
    plain = [escape(row[key]) for key in ("op", "shape", "dtype", "pass")]
    if "ms" not in row:
        look = "none" if "skipped" in row else "loss"
        cells = "".join(f"<td>{cell}</td>" for cell in plain)
        return f'<tr {data}>{cells}<td class="{look}" colspan="{len(names) + 4}">{escape(why_untimed(row))}</td></tr>'
    ms = row["ms"]
    spread = f"p20 {milliseconds(ms['p20'])}, p80 {milliseconds(ms['p80'])} ms"
    cells = [f"<td>{cell}</td>" for cell in (*plain, escape(row["backend"]))]
    cells.append(f'<td title="{spread}">{milliseconds(ms["median"])}</td>')
    cells += [_cell(row, name) for name in names]
    share = f"{100 * row['share_of_floor']:.0f} %" if "share_of_floor" in row else ""
    return f"<tr {data}>{''.join(cells)}<td>{share}</td><td>{extra(row)}</td></tr>"


def _cell(row: Row, name: str) -> str:
    if name not in row["ratio"]:
        why = escape(row["absent"].get(name, "not asked for on this row"))
        return f'<td class="none" title="{why}">·</td>'
    ratio, low, high = (row[key][name] for key in ("ratio", "ratio_p20", "ratio_p80"))
    title = f"{milliseconds(row['peer_ms'][name]['median'])} ms; ratio p20 {times(low)}, p80 {times(high)}"
    return f'<td class="{"win" if ratio >= 1 else "loss"}" title="{title}">{times(ratio)}</td>'


def _figure(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<figure><img alt="{escape(picture.stem)}" src="data:image/png;base64,{data}"></figure>'
