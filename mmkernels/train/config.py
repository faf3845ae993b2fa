"""What a training run is: its choices, the stages they give, and whether a folder already holds another run."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch

from mmkernels import models
from mmkernels.data import Tokenizer, store
from mmkernels.models import Stage
from mmkernels.train.families import known

RUN = "run.json"


@dataclass(frozen=True)
class Run:
    """The choices that decide every number of a run.

    `steps` is the length of the whole run, which its stages share in the proportions of the model's recipe; None takes the
    recipe's own. `batch` is the number of documents of the smallest batch of a step; the others follow the stage's mix.
    """

    model: str = "flamingo-tiny"
    data: str = "digits"
    seed: int = 0
    steps: int | None = None
    batch: int = 16
    precision: str = "float32"

    def __post_init__(self) -> None:
        trainable(self.model)
        for name, value, least in (
            ("seed", self.seed, 0),
            ("steps", self.steps, 1),
            ("batch", self.batch, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, expected {least} or more")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: got {self.precision!r}, expected 'float32' or 'bfloat16'")

    def stages(self) -> list[tuple[Stage, int]]:
        """The model's stages, each with its number of steps."""
        stages = models.config(self.model).stages
        recipe = [stage.steps or 0 for stage in stages]
        if self.steps is None:
            return list(zip(stages, recipe, strict=True))
        ends = [round(self.steps * sum(recipe[: i + 1]) / sum(recipe)) for i in range(len(recipe))]
        return [(s, end - start) for s, start, end in zip(stages, [0, *ends], ends, strict=False)]

    def total(self) -> int:
        return sum(steps for _, steps in self.stages())


def trainable(model: str) -> None:
    """**Raises** ValueError unless the model is known and is one that starts from nothing."""
    config = models.config(model)
    tokenizer = (Tokenizer.image, Tokenizer.end_of_chunk, Tokenizer.end_of_text, Tokenizer.pad)
    if not known(model):
        raise ValueError(f"model {model!r}: the training loop knows other families; train one of: {_tiny()}")
    if dataclasses.astuple(config.tokens) != tokenizer or not all(stage.steps for stage in config.stages):
        raise ValueError(
            f"model {model!r} starts from published weights and their tokenizer; train one of: {_tiny()}"
        )


def _tiny() -> str:
    return ", ".join(name for name in models.list() if name.endswith("-tiny") and known(name))


def check_folder(run: Run, out: Path, resume: str) -> None:
    """**Raises** ValueError when `out` is another run's folder, or holds other things, or this run and may not be resumed."""
    if resume not in ("auto", "never"):
        raise ValueError(f"resume: got {resume!r}, expected 'auto' or 'never'")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, expected a folder to train in")
    if (out / RUN).is_file():
        differ = list(_differences(store.read_json(out / RUN), describe(run)))
        if differ:
            raise ValueError(f"{out}: belongs to another run ({'; '.join(differ)}); choose another folder")
        if resume == "never":
            raise ValueError(f"{out}: already holds this run; choose another folder, or resume it")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: holds files that are no run's; choose an empty or a new folder")


def claim(run: Run, out: Path) -> None:
    """Makes `out` this run's folder."""
    out.mkdir(parents=True, exist_ok=True)
    store.write(out / RUN, store.to_json(describe(run)))


def describe(run: Run) -> dict[str, Any]:
    """A run as JSON; the recipe is part of it, so a library with another one does not continue it."""
    recipe = [_plain(asdict(stage)) for stage, _ in run.stages()]
    return {**asdict(run), "steps": run.total(), "recipe": recipe}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for key in sorted(here.keys() | there.keys()):
        if there.get(key) != here.get(key):
            shown = (
                "another recipe" if key == "recipe" else f"{key} {there.get(key)!r}, not {here.get(key)!r}"
            )
            yield shown


def environment(device: str) -> dict[str, Any]:
    """What else decides the bits of a run; when it changes, the curve continues, but not bit for bit."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "device": device,
    }
