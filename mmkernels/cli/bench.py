"""`mmkernels bench`: every op against what users can write today."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mmkernels

LISTS = {
    "op": ("ops", "rooms by name, or models"),
    "shape": ("shapes", "shapes by name"),
    "dtype": ("dtypes", "float32, bfloat16, float16"),
    "pass": ("passes", "fwd, bwd, fwd+bwd"),
    "peers": ("peers", "eager, compiled, sdpa, flex, segments, ..., or a backend of ours"),
}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time every op against what users can write today",
        description="Judges every row's outputs and gradients, then times ours and its peers in turn. A full run files its "
        "table, plots and page under benchmarks/results/<device>, a partial one under build/bench. Lists are comma-separated "
        "and may be repeated.",
        epilog="example: mmkernels bench --op interval_attention --dtype float32 --peers eager,sdpa,segments",
    )
    for name, (_, text) in LISTS.items():
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="A,B", help=f"{text} (default: all)"
        )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="headline rows only, a quarter of the time each")
    parser.add_argument("--seconds", type=float, default=1.5, help="timing of a row (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="repeat in fresh processes and take medians")
    parser.add_argument("--out", type=Path, help="folder for table, plots and page")
    parser.add_argument("--json", type=Path, help="write the record there too; - prints it instead of tables")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--html", type=Path, help="write the page there too")
    parser.set_defaults(run=run)


def benchmarks() -> Path:
    """The checkout that holds the benchmarks, made importable. **Raises** FileNotFoundError where there is none."""
    for root in (Path(mmkernels.__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "row.py").is_file():
            sys.path[:0] = [] if str(root) in sys.path else [str(root)]
            return root
    raise FileNotFoundError(
        "the benchmarks are not part of the installed package: run this in a source checkout (`make bench` there)"
    )


def run(options: argparse.Namespace) -> int:
    root = benchmarks()
    wanted_module, runner, machine = map(
        importlib.import_module, ("benchmarks.wanted", "benchmarks.run", "benchmarks.machine")
    )
    lists = {field: _split(",".join(getattr(options, name))) for name, (field, _) in LISTS.items()}
    wanted = wanted_module.Wanted(
        **lists, device=options.device, quick=options.quick, seconds=options.seconds
    )
    if options.processes < 1:
        raise ValueError(f"processes: got {options.processes}, expected 1 or more")
    if options.processes > 1:
        record = runner.merge([_child(root) for _ in range(options.processes)])
    else:
        with _progress(len(runner.plan(wanted))) as bar:
            record = runner.run_all(wanted, _observer(bar))
    home = root / "benchmarks" / "results" if wanted.everything else root / "build" / "bench"
    written = _write(record, options.out or home / machine.slug(wanted.device), options)
    if str(options.json) == "-":
        print(json.dumps(record))
    else:
        console = Console(width=None if sys.stdout.isatty() else 190)
        importlib.import_module("benchmarks.report").print_tables(record, console)
        print(f"{record['seconds']} s; wrote {', '.join(map(str, written))}")
    return 0 if all(row.get("correct", True) for row in record["rows"]) else 1


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _child(root: Path) -> dict[str, Any]:
    """The record of the same command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        mine = ["--processes", "1", "--out", folder, "--json", f"{folder}/record.json"]
        command = [sys.executable, "-m", "mmkernels.cli.main", *sys.argv[1:], *mine]
        done = subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL)
        if done.returncode not in (0, 1):  # 1: some row is wrong, and the record says which
            raise RuntimeError(f"a benchmark process ended with status {done.returncode}")
        return json.loads(Path(folder, "record.json").read_text())


def _write(record: dict[str, Any], folder: Path, options: argparse.Namespace) -> list[Path]:
    """All files into `folder`, and copies where they were asked for; returns what was written."""
    report = importlib.import_module("benchmarks.report")
    folder.mkdir(parents=True, exist_ok=True)
    targets = [path for path in (options.json, options.csv, options.html) if path and str(path) != "-"]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(record, folder / "bench.json")
    report.write_csv(record, folder / "bench.csv")
    if options.json in targets:
        report.write_json(record, options.json)
    if options.csv:
        report.write_csv(record, options.csv)
    try:
        pictures = importlib.import_module("benchmarks.plots").draw(record, folder)
    except ImportError as error:
        Console(stderr=True).print(f"note: no pictures, {error}", highlight=False, markup=False)
        pictures = []
    page = importlib.import_module("benchmarks.page")
    for file in (folder / "bench.html", *([options.html] if options.html else [])):
        page.write(record, pictures, file)
    return [folder, *targets]


def _progress(total: int) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    bar.add_task("probing the machine", total=total)
    return bar


def _observer(bar: Progress) -> Callable[[str, list[Any]], None]:
    """Moves the bar; without a terminal, one line on standard error for each finished step."""

    def observe(title: str, rows: list[dict[str, Any]]) -> None:
        bar.update(bar.task_ids[0], description=title, advance=1 if rows else 0)
        if rows and bar.disable:
            bar.console.print(
                f"{title}: {'; '.join(map(_brief, rows))}", highlight=False, markup=False, soft_wrap=True
            )

    return observe


def _brief(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"{row['pass']} " + ("skipped" if "skipped" in row else "WRONG")
    ratios = " ".join(f"{name} {ratio:g}x" for name, ratio in row["ratio"].items())
    return f"{row['pass']} {row['ms']['median']:g} ms ({ratios})"
