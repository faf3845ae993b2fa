"""`mmkernels convert`: an authors' pickle becomes safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmkernels.models import weights


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="turn an authors' .pt or .bin file into safetensors",
        description="Reads tensors and plain containers from a pickle, in a process of its own, and refuses anything else.",
        epilog="example: mmkernels convert checkpoint.pt checkpoint.safetensors",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a .pt or .bin file")
    parser.add_argument("target", type=Path, metavar="OUT.safetensors", help="the file to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.target.suffix != ".safetensors":
        raise ValueError(f"{options.target}: expected a name that ends in .safetensors")
    if not options.target.parent.is_dir():
        raise FileNotFoundError(f"{options.target.parent}: no such folder")
    keys = weights.convert(options.source, options.target)
    print(f"{options.target}: {len(keys)} tensors")
    return 0
