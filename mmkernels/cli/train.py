"""`mmkernels train`: a model from nothing, on real pictures."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mmkernels
from mmkernels import data
from mmkernels.primitives._op import BACKENDS
from mmkernels.train import Result, Run, draw, train
from mmkernels.train.recipes import recipe


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model on images with captions, in its published stages",
        description="Trains a model from nothing on real pictures with captions, evaluates it on held-out ones, and "
        "keeps checkpoints, a log and a loss curve in a folder. Killed and started again, it continues bit for bit.",
        epilog="example: mmkernels train --model flamingo-tiny --data digits --out runs/tiny",
    )
    parser.add_argument("--model", help=f"a model that trains from nothing (default: {Run.model})")
    parser.add_argument(
        "--recipe", help="instead: a published system, at its tiny size; see mmkernels models"
    )
    parser.add_argument(
        "--data", default="digits", help=f"{', '.join(data.names())}, or shards:FOLDER (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the run's folder: new, empty, or this run's own"
    )
    parser.add_argument("--steps", type=int, help="length of the whole run (default: the recipe's)")
    parser.add_argument(
        "--batch", type=int, default=Run.batch, help="documents a step (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=Run.seed, help="of weights and batches (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", default=Run.precision, help="float32 or bfloat16 (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", default="auto", help="auto: continue what the folder holds; never: refuse to"
    )
    parser.add_argument(
        "--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="kernels to use where it has them (default: the fastest)"
    )
    parser.add_argument("--recompute", action="store_true", help="keep less memory, compute blocks again")
    parser.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name in ("threads", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: got {value}, expected 1 or more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: got {options.device!r}, expected cpu" + ", or cuda where there is one")
    chosen = Run(_model(options), options.data, options.seed, options.steps, options.batch, options.precision)
    kernels = mmkernels.using(options.backend, "reference") if options.backend else nullcontext()
    with warnings.catch_warnings(), kernels, _progress(chosen.total()) as bar:
        warnings.showwarning = lambda message, *_, **__: bar.console.print(
            f"note: {message}", highlight=False
        )
        result = train(
            chosen, options.out, resume=options.resume, device=options.device, save_every=options.save_every,
            recompute=options.recompute, tensorboard=options.tensorboard, observe=_observer(bar, chosen.total()),
        )  # fmt: skip
    curve = _draw(options.out)
    if options.json:
        print(json.dumps({**asdict(result), "curve": str(curve) if curve else None}))
    else:
        _print(result, chosen, curve)
    return 0


def _model(options: argparse.Namespace) -> str:
    if options.recipe is None:
        return options.model or Run.model
    if options.model is not None:
        raise ValueError(f"model, recipe: got {options.model!r} and {options.recipe!r}, expected one of them")
    return recipe(options.recipe).tiny


def _progress(total: int) -> Progress:
    """A bar on standard error; `_observer` prints lines instead where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    bar.add_task("", total=total)
    return bar


def _observer(bar: Progress, total: int) -> Callable[[dict[str, Any]], None]:
    def observe(record: dict[str, Any]) -> None:
        shown = f"{record['stage']}, loss {record['loss']:.3f}"
        bar.update(bar.task_ids[0], completed=record["step"], description=shown)
        if bar.disable and (record["step"] % 50 == 0 or record["step"] == total):
            bar.console.print(f"step {record['step']} of {total}: {shown}", highlight=False)
        if "held_out" in record:
            bar.console.print(f"after {record['stage']}:", highlight=False)
            for line in _measured(record["held_out"]):
                bar.console.print(f"  {line}", highlight=False, markup=False)

    return observe


def _measured(figures: dict[str, Any]) -> list[str]:
    """What was measured at a stage's end, a line each: shares, and true captions with the written ones."""
    lines = [f"{name:32} {share:6.1%}" for name, share in figures.items() if isinstance(share, float)]
    return lines + [f"{true!r} is captioned {written!r}" for true, written in figures.get("captions", [])]


def _draw(out: Path) -> Path | None:
    try:
        return draw(out)
    except ImportError as error:
        Console(stderr=True).print(f"note: {error}", highlight=False, markup=False)
        return None


def _print(result: Result, chosen: Run, curve: Path | None) -> None:
    print(
        f"{chosen.model} on {chosen.data}: {result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.3f}"
    )
    print(f"held-out last-image accuracy  {result.accuracy:6.1%}  ({result.documents} documents)")
    print(f"with the pictures shuffled    {result.shuffled:6.1%}  (chance {result.chance:.1%})")
    worst = min(result.captions, key=lambda caption: result.captions[caption])
    print(f"the hardest caption           {result.captions[worst]:6.1%}  ({worst!r})")
    for stage, figures in result.held_out.items():
        print(f"held out, after {stage}:")
        print("\n".join(f"  {line}" for line in _measured(figures)))
    print(f"checkpoint  {result.checkpoint}")
    if curve:
        print(f"loss curve  {curve}")
