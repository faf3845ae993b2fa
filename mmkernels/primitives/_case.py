"""A room as data: how to make its inputs, which shapes to test and to time, and what users call instead.

One test runner (tests/test_ops.py) and one bench runner (benchmarks/run.py) read every room's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Peer = Callable[[Inputs], Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape. `sizes` goes to the room's maker; `dtypes` are the ones run (float64 is always the exact answer).

    For the bench: the `passes` that make sense, and whether this is a `headline`, shown first and timed against compiled
    peers too, which take seconds to build.
    """

    name: str
    sizes: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    passes: tuple[str, ...] = ("fwd", "fwd+bwd")
    headline: bool = False


@dataclass(frozen=True)
class Cost:
    """The floor of one forward pass: useful FLOPs, and bytes that must move once.

    `backward` and `backward_bytes` say how many times as much the backward pass needs: inputs are read again beside the
    incoming gradient, and as many gradients are written.
    """

    flops: float
    bytes: float
    backward: float = 2.5
    backward_bytes: float = 2.0


class Unsuited(Exception):
    """A peer cannot compute these inputs, or nobody would ask it to; the text says why."""


@dataclass(frozen=True)
class Room:
    """Everything the runners need to know about one public op.

    `make(seed, dtype, device, **sizes)` gives the inputs by name; `call(inputs)` the op's outputs, the first of which peers
    produce too; `differentiable` names the inputs that get gradients. A peer takes the inputs, prepares its metadata (masks,
    segment lists) and returns the function to time, or raises `Unsuited`. `eager` is required: the accuracy rule measures
    against it.
    """

    name: str
    make: Callable[..., Inputs]
    call: Callable[[Inputs], Tensor | tuple[Tensor, ...]]
    differentiable: tuple[str, ...]
    tests: tuple[Case, ...]
    bench: tuple[Case, ...]
    cost: Callable[[Inputs], Cost]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    ops: tuple[str, ...] = ()  # the operators behind `call`, forward then backward


def generator(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def uneven_boundaries(rows: int, parts: int) -> list[int]:
    """Where `parts` runs start among `rows`, at odd places, the first after a prefix: real documents are not regular."""
    weights = [1.0 + 0.8 * ((7 * i + 3) % 5) for i in range(parts + 1)]
    total, at, starts = sum(weights), 0.0, []
    for weight in weights[:-1]:
        at += weight
        starts.append(min(rows - 1, int(rows * at / total)))
    return starts
