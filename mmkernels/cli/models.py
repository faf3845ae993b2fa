"""`mmkernels models`: what can be built."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmkernels import models
from mmkernels.layers import T5Config
from mmkernels.train.recipes import RECIPES


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "models",
        help="list the models and presets",
        description="Lists every model that can be built by name, with its size and its training stages, and every published "
        "system with what stands.",
        epilog="example: mmkernels models --json",
    )
    parser.add_argument("--recipe", choices=RECIPES, help="print one published system's whole recipe instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.recipe is not None:
        return _print_recipe(RECIPES[options.recipe].describe(), options.json)
    found = [_describe(name) for name in models.list()]
    recipes = [{"name": name, **one.describe()} for name, one in RECIPES.items()]
    if options.json:
        print(json.dumps({"models": found, "recipes": recipes}))
        return 0
    table = Table("model", "parameters", "image", "layers", "width", "stages")
    for row in found:
        parameters = f"{row['parameters'] / 1e6:,.1f} M"
        numbers = (str(row[key] or "any") for key in ("image_size", "layers", "width"))
        table.add_row(row["name"], parameters, *numbers, ", ".join(row["stages"]))
    Console().print(table)
    systems = Table("recipe", "system", "published size", "trained here", "stands")
    for row in recipes:
        stands = " · ".join(row["stands"]) or "not yet"
        systems.add_row(row["name"], row["system"], row["preset"], row["tiny"], stands)
    Console().print(systems)
    return 0


def _print_recipe(found: dict[str, Any], as_json: bool) -> int:
    """A recipe in lines, its stages indented."""
    if as_json:
        print(json.dumps(found))
        return 0
    for key in (
        "system",
        "paper",
        "preset",
        "tiny",
        "connector",
        "prompt",
        "labels",
        "apart",
        "parity",
        "notes",
    ):
        if found[key]:
            print(f"{key:10} {found[key]}")
    for stage in found["stages"]:
        print(f"stage      {stage['name']}")
        for key, value in stage.items():
            if key != "name" and value not in (None, {}, 0):
                shown = ", ".join(value) if isinstance(value, list | tuple) else value
                print(f"  {key:14} {shown}")
        if stage["name"] in found["data"]:
            mix = found["data"][stage["name"]]
            cap = f", at most {mix['cap']:,} a source" if mix["cap"] else ""
            print(f"  {'data':14} {mix['sets']} by {mix['by']}{cap}")
    print(f"stands     {', '.join(found['stands']) or 'not yet'}")
    return 0


def _describe(name: str) -> dict[str, Any]:
    config: Any = models.config(name)
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    vision = getattr(config, "vision", None)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": vision.image_size if vision else None,  # without a tower: any
        "layers": config.lm.layers,
        "width": config.lm.width if isinstance(config.lm, T5Config) else config.lm.block.width,
        "stages": [stage.name for stage in config.stages],
    }
