"""A training process that kills itself: `python worker.py FOLDER STEPS MOMENT COUNT`, at the COUNT-th MOMENT.

Moments are `fsync` and `replace` (inside a save) and `step` (between saves); `never` runs to the end. The pictures are noise,
so that nothing but torch and Pillow has to be imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkernels import data
from mmkernels.data.dataset import Dataset, Picture
from mmkernels.train import Run, train, trainer


def noise() -> Dataset:
    """Four captions, each with pictures of its own colour."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 2, 40, 40, 3), dtype=np.uint8)
    pictures = tuple(tuple(Picture(p, c, flip=True) for p in row) for c, row in enumerate(pixels))
    return Dataset("noise", ("a red one", "a green one", "a blue one", "none of them"), pictures, pictures)


def deadly(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def main(folder: str, steps: str, moment: str, count: str) -> None:
    torch.set_num_threads(2)
    data._BUILDERS["noise"] = noise
    trainer.HELD_OUT = 4
    observe: Callable[[dict[str, Any]], None] = lambda record: None  # noqa: E731 - wrapped below
    if moment == "step":
        observe = deadly(observe, int(count))
    elif moment != "never":
        setattr(os, moment, deadly(getattr(os, moment), int(count)))
    train(Run(data="noise", steps=int(steps), batch=1), Path(folder), save_every=2, observe=observe)


if __name__ == "__main__":
    main(*sys.argv[1:])
