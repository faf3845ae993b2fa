"""Training stages: what learns, from which losses and data, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe. Patterns are shell patterns over parameter names; a pattern that meets nothing is an error.

    `losses` weighs the batches of a step, `mix` the samples drawn for them. `weight_decay` gives decay by pattern; parameters
    that no pattern meets have none, nor, unless `decay_vectors`, have those with fewer than two dimensions. The rate rises
    linearly over `warmup` steps (below 1: that share of all steps), then follows `schedule`: "constant", or "cosine" down to
    `floor`. `betas` are AdamW's. Gradients are clipped to norm `clip`. `steps` is the stage's length where the recipe sets one,
    `image_size` the side of its pictures where that is not the tower's own. `rates` are shares of the rate by pattern.
    """

    name: str
    trainable: tuple[str, ...]
    losses: Mapping[str, float]
    mix: Mapping[str, float]
    learning_rate: float
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "constant"
    warmup: float = 0
    clip: float = 1.0
    steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    floor: float = 0.0
    decay_vectors: bool = True
    image_size: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict)

    def freeze(self, model: nn.Module) -> None:
        """Makes exactly this stage's parameters trainable."""
        met = set()
        for name, parameter in model.named_parameters():
            hits = [pattern for pattern in self.trainable if fnmatchcase(name, pattern)]
            met.update(hits)
            parameter.requires_grad_(bool(hits))
        missing = [pattern for pattern in self.trainable if pattern not in met]
        if missing:
            raise ValueError(f"trainable: {', '.join(missing)} meets no parameter of {type(model).__name__}")

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters for an optimizer, one group for each weight decay and share of the rate (`scale`)."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                patterns = self.weight_decay if self.decay_vectors or parameter.dim() > 1 else {}
                key = (_first(patterns, name, 0.0), _first(self.rates, name, 1.0))
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": params, "weight_decay": decay, "lr": self.learning_rate * scale, "scale": scale}
            for (decay, scale), params in groups.items()
        ]


def _first(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    """What the first pattern that meets a name gives it."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)
