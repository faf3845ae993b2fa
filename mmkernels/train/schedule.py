"""The learning rate of a step."""

from __future__ import annotations

import math

from mmkernels.models import Stage


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """The rate at step `step` (from 0) of a stage of `steps`: a linear rise, then the stage's schedule."""
    warmup = stage.warmup if stage.warmup >= 1 else stage.warmup * steps
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if stage.schedule == "constant":
        return stage.learning_rate * rise
    if stage.schedule == "cosine":
        done = max(0.0, step - warmup) / max(1.0, steps - warmup)
        above = (stage.learning_rate - stage.floor) * rise * (1 + math.cos(math.pi * min(1.0, done))) / 2
        return stage.floor * rise + above
    raise ValueError(
        f"stage {stage.name!r}: schedule {stage.schedule!r} is unknown, expected 'constant' or 'cosine'"
    )
