"""`mmkernels bench`: every op against what users can write today."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

_LISTS = {
    "ops": ("--op", "rooms"),
    "shapes": ("--shape", "named shapes"),
    "dtypes": ("--dtype", "float32, bfloat16"),
    "passes": ("--pass", "fwd, bwd, fwd+bwd"),
    "peers": ("--peers", "peers"),
}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time every op against what users can write today",
        description="Correctness first, then ours and the peers interleaved. Writes JSON, CSV, PNG and one HTML page.",
        epilog="example: mmkernels bench --op interval_attention --dtype float32 --peers eager,sdpa,segments",
    )
    for name, (option, text) in _LISTS.items():
        parser.add_argument(option, dest=name, default="", help=f"{text}, comma-separated; all by default")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--quick", action="store_true", help="headline shapes only, less time for each")
    parser.add_argument("--json", action="store_true", help="print the JSON object instead of the table")
    parser.add_argument(
        "--out", type=Path, help="folder for the files; benchmarks/results/<device> by default"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        from benchmarks import report
        from benchmarks.run import Wanted, run_all
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "benchmarks":
            raise
        print(
            "mmkernels bench: the benchmarks are not installed; run it in a source checkout", file=sys.stderr
        )
        return 2
    lists = {name: tuple(filter(None, getattr(options, name).split(","))) for name in _LISTS}
    wanted = Wanted(**lists, device=options.device, quick=options.quick)
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            found = run_all(wanted, lambda text, rows: status.update(text))
    else:
        found = run_all(wanted)
    files = report.write(found, options.out or report.ROOT / "benchmarks" / "results" / found["slug"])
    if options.json:
        print(json.dumps(found))
    else:
        report.print_table(found, Console(width=None if sys.stdout.isatty() else 200))
        print("wrote", ", ".join(str(file) for file in files))
    return 0 if all(row.get("correct", True) for row in found["rows"]) else 1
