"""Training stages: what learns, from which losses and data, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    `image_size` the side of its pictures where that is not the tower's own. `rates` are shares of the rate by pattern. With a
    `layer_decay` d, block i of a tower's n learns at the rate times `d^(n - i)`, what is before the blocks at the rate times
    `d^(n + 1)`.
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
    layer_decay: float = 1.0
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
        """The trainable parameters for an optimizer, a group for each weight decay and each `scale` of the learning rate."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        depth_scale = self._scales(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                patterns = self.weight_decay if self.decay_vectors or parameter.dim() > 1 else {}
                scale = _first(self.rates, name, 1.0) * depth_scale(name)
                groups.setdefault((_first(patterns, name, 0.0), scale), []).append(parameter)
        return [
            {"params": params, "weight_decay": decay, "lr": self.learning_rate * scale, "scale": scale}
            for (decay, scale), params in groups.items()
        ]

    def _scales(self, model: nn.Module) -> Callable[[str], float]:
        """How a parameter's learning rate, by its name, differs from the stage's."""
        blocks = [_depth(name) for name, _ in model.named_parameters()] if self.layer_decay != 1 else []
        after = 1 + max((depth for depth in blocks if depth is not None), default=0)

        def scale(name: str) -> float:
            depth = _depth(name)
            return 1.0 if self.layer_decay == 1 or depth is None else self.layer_decay ** (after - depth)

        return scale


def _depth(name: str) -> int | None:
    """How deep in a model's tower a parameter lies: 0 before the blocks, 1 in the first; None beside the tower."""
    if not name.startswith("vision."):
        return None
    parts = name.split(".")
    return 1 + int(parts[parts.index("blocks") + 1]) if "blocks" in parts else 0


def _first(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    """What the first pattern that meets a name gives it."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), otherwise)
