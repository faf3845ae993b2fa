"""Runs every recipe at its tiny size, some steps of each stage and one generation, and writes docs/recipes-measured.md.

python tools/recipes.py [--steps 40] [--batch 8] [--only NAME]...
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmkernels import models
from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer
from mmkernels.train.recipes import RECIPES, Recipe

TABLE = Path(__file__).parents[1] / "docs" / "recipes-measured.md"
_HEAD = """# Recipes, run

`make recipes`: each recipe's tiny model through all of its stages, {steps} steps in all of {batch} documents, on `digits`,
then one caption of a blank picture. The run is short on purpose: losses say that each stage learns, not how well the model
does. Seconds are of this run on one thread, torch {torch}, with whatever else the machine did.

| recipe | system | model | stages: first and last loss | seconds | writes |
|---|---|---|---|--:|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", action="append", default=[], choices=RECIPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, str] = {}
    rows = []
    for name, recipe in RECIPES.items():
        if options.only and name not in options.only:
            continue
        if "trains" not in recipe.stands():
            rows.append(f"| `{name}` | {recipe.system} | {recipe.tiny} | not yet | | |")
        else:
            if recipe.tiny not in done:
                done[recipe.tiny] = _run(recipe, options.steps, options.batch)
            rows.append(f"| `{name}` | {recipe.system} | {recipe.tiny} | {done[recipe.tiny]} |")
        print(rows[-1], flush=True)
    head = _HEAD.format(
        steps=options.steps, batch=options.batch, threads=torch.get_num_threads(), torch=torch.__version__
    )
    if not options.only:
        TABLE.write_text(head + "\n".join(rows) + "\n")


def _run(recipe: Recipe, steps: int, batch: int) -> str:
    """The last three columns of a row."""
    run = Run(model=recipe.tiny, steps=steps, batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        trainer = Trainer(run, Path(folder) / "run")
        records = [trainer.take_step() for _ in range(run.total())]
        seconds = time.perf_counter() - begun
    losses = []
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record["loss"] for record in records if record["stage"] == stage]
        losses.append(f"{stage} {own[0]:.2f} → {own[-1]:.2f}")
    config: Any = models.config(recipe.tiny)
    captioner = Captioner(
        trainer.model, trainer.tokenizer, config.vision.image_size if hasattr(config, "vision") else 0
    )
    written = captioner.caption([Image.new("RGB", (48, 48), "navy")], "what is shown?", max_new_tokens=8)
    shown = " ".join(written.split()).replace("|", "\\|")
    return f"{'; '.join(losses)} | {seconds:.0f} | {shown!r}"


if __name__ == "__main__":
    main()
