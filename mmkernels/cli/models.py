"""`mmkernels models`: what can be built."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmkernels import models
from mmkernels.cli import compute
from mmkernels.layers import T5Config


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "models",
        help="list the models and presets",
        description="Lists every model that can be built by name, with its size and its training stages.",
        epilog="example: mmkernels models --json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--compute", action="store_true", help="what a picture costs LLaVA-1.5 and LLaVA-UHD instead"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.compute:
        return _compute(options)
    found = [_describe(name) for name in models.list()]
    if options.json:
        print(json.dumps({"models": found}))
        return 0
    table = Table("model", "parameters", "image", "layers", "width", "stages")
    for row in found:
        parameters = f"{row['parameters'] / 1e6:,.1f} M"
        numbers = (str(row[key]) for key in ("image_size", "layers", "width"))
        table.add_row(row["name"], parameters, *numbers, ", ".join(row["stages"]))
    Console().print(table)
    return 0


def _compute(options: argparse.Namespace) -> int:
    rows = compute.table()
    if options.json:
        print(json.dumps({"compute": rows}))
        return 0
    table = Table(
        "model",
        "image",
        "views",
        "visual tokens",
        "a view",
        "tower",
        "connector",
        "language",
        "TFLOPs",
        "share",
    )
    for row in rows:
        counts = (str(row[key]) for key in ("views", "visual_tokens", "tokens_per_view"))
        work = (f"{row[key] / 1e12:.2f}" for key in ("tower", "connector", "language", "flops"))
        table.add_row(row["name"], row["image"], *counts, *work, f"{row['share']:.1%}")
    Console().print(table)
    return 0


def _describe(name: str) -> dict[str, Any]:
    config, model = models.config(name), models.build(name, device="meta", dtype=torch.bfloat16)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": config.vision.image_size,
        "layers": config.lm.layers,
        "width": config.lm.width if isinstance(config.lm, T5Config) else config.lm.block.width,
        "stages": [stage.name for stage in config.stages],
    }
