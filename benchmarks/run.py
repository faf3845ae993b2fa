"""The one runner: every wanted row of every room, then whole models, as one record in the documented JSON form."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import front_end, generation, machine, models, rates
from benchmarks.row import bench, floor
from benchmarks.wanted import Row, Wanted, dtype_name, table

Record = dict[str, Any]


def plan(wanted: Wanted) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    """What will run: a title for people, and the function that makes its rows."""
    steps: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (
            f"{room.name} {case.name} {dtype_name(dtype)}",
            lambda r=room, c=case, d=dtype: bench(r, c, d, wanted),
        )
        for room, case, dtype in table(wanted)
    ]
    steps += front_end.plan(wanted)
    whole = models.plan(wanted) + generation.plan(wanted)
    return steps + [(f"models {title}", make) for title, make in whole]


def run_all(
    wanted: Wanted, progress: Callable[[str, list[Row]], object] = lambda title, rows: None
) -> Record:
    """Runs the plan; `progress(title, rows)` hears each step twice: before, without rows, and after."""
    begun, queue, rows = time.perf_counter(), machine.run_queue(), []
    best = rates.of(wanted.device)
    best.record()  # now and at the end: the better one counts
    for title, make in plan(wanted):
        progress(title, [])
        found = list(make())
        progress(title, found)
        rows += found
    best.again()
    rows = [row | floor(row, wanted.device) for row in rows]
    return {
        **machine.describe(wanted.device),
        "rates": best.record(),
        "load": load(rows, queue),
        "seconds": round(time.perf_counter() - begun),
        "processes": 1,
        "rows": rows,
    }


def load(rows: list[Row], queue: float) -> dict[str, Any]:
    """What others did meanwhile: the run queue before, the cores they took in the median row, and the verdict."""
    taken = [row["others_cores"] for row in rows if row.get("others_cores") is not None]
    median = statistics.median(taken) if taken else 0.0
    return {"run_queue": queue, "others_cores": median, "loaded": median > machine.BUSY}


def merge(records: list[Record]) -> Record:
    """Several processes' records as one: medians of their medians, row by row; a row that was wrong in one is wrong."""
    merged = {**records[-1], "processes": len(records), "seconds": sum(r["seconds"] for r in records)}
    merged["rows"] = [_merge(list(rows)) for rows in zip(*(r["rows"] for r in records), strict=True)]
    merged["load"] = load(merged["rows"], max(r["load"]["run_queue"] for r in records))
    return merged


def _merge(rows: list[Row]) -> Row:
    wrong = [row for row in rows if "ms" not in row]
    if wrong:
        return wrong[0]
    return {key: _median([row.get(key) for row in rows]) for key in rows[0]}


def _median(values: list[Any]) -> Any:
    first = (
        next(value for value in values if value is not None) if any(v is not None for v in values) else None
    )
    if isinstance(first, dict):
        return {key: _median([v[key] for v in values if v and key in v]) for key in first}
    if isinstance(first, float):
        return statistics.median(v for v in values if v is not None)
    return first
