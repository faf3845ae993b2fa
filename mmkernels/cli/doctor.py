"""`mmkernels doctor`: op x backend, versions, build, and a self-test."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from mmkernels import doctor


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what this installation can do, and why not more",
        description="Shows every op's backends with the reason for each no, versions, and a self-test. "
        "Exit status 1 when something is wrong.",
        epilog="example: mmkernels doctor --json | jq .problems",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    found = doctor.report()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found, Console())
    return 1 if found["problems"] else 0


def _print(found: dict[str, Any], console: Console) -> None:
    console.print(
        "  ".join(f"{name} {version}" for name, version in found["versions"].items()), highlight=False
    )
    cpu = found["devices"]["cpu"]
    console.print(
        f"CPU: {cpu['capability']}, {cpu['threads']} threads, kernels {cpu['isa']}", highlight=False
    )
    gpus = ", ".join(found["devices"]["gpus"]) or f"none: {found['devices']['why_no_gpu']}"
    console.print(f"GPU: {gpus}", highlight=False)
    for module, why in found["modules"].items():
        console.print(f"{module}: {why or 'loaded'}", highlight=False)
    table = Table("op", "device", "backend", "usable", title="Ops and backends")
    for op, by_device in found["ops"].items():
        for device, rows in by_device.items():
            for backend, why in rows.items():
                table.add_row(op, device, backend, (why and f"[yellow]{why}[/]") or "[green]yes[/]")
    console.print(table)
    for room, why in found["self_test"].items():
        console.print(f"self-test {room}: {(why and f'[red]{why}[/]') or '[green]passed[/]'}")
    for problem in found["problems"]:
        console.print(f"[red]problem:[/] {problem}")
