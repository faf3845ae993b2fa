"""What the tables of this room's ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._case import Case, generator

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
UHD = (
    (24, 24),
    (24, 18),
    (24, 18),
    (20, 15),
    (15, 20),
    (24, 24),
    (10, 20),
)  # {576, 432, 432, 300, 300, 576, 200}

Run = Callable[[], Tensor]
Draw = Callable[..., Tensor]


def drawer(seed: int, dtype: torch.dtype, device: str) -> Draw:
    random = generator(seed, device)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    return draw


def slices_of(slices: tuple[tuple[int, int], ...], device: str) -> tuple[Tensor, int]:
    """slice_hw and the number of patches."""
    return torch.tensor(slices, device=device, dtype=torch.int64).view(-1, 2), sum(h * w for h, w in slices)


def a_test(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


def a_bench(name: str, headline: bool = False, **sizes: Any) -> Case:
    return Case(name, sizes, (F32, BF16), ("fwd", "fwd+bwd"), headline)
