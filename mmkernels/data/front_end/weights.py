"""Weights of a separable resize as arrays: csrc/host/weights.h for the GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmkernels.data.front_end.jobs import BICUBIC

BITS = 22  # of fraction in a whole-number weight, as Pillow's


class Axis(NamedTuple):
    """Output i is made of `count[i]` inputs from `first[i]` on, int32 `[n]`, with weights float64 `[n, taps]`."""

    first: NDArray[np.int32]
    count: NDArray[np.int32]
    weights: NDArray[np.float64]

    def fixed(self) -> NDArray[np.int32]:
        scaled = self.weights * (1 << BITS)
        return np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5)).astype(np.int32)


def _cubic(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def widened(before: int, after: int, filter: int) -> Axis:
    """Pillow's: the filter is widened where the axis shrinks; torch's antialias is the same."""
    scale = before / after
    wide = max(scale, 1.0)
    support = (2.0 if filter == BICUBIC else 1.0) * wide
    centre = (np.arange(after) + 0.5) * scale
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), before) - low
    tap = np.arange(count.max())
    x = np.abs((tap + low[:, None] - centre[:, None] + 0.5) * (1.0 / wide))
    k = _cubic(x, -0.5) if filter == BICUBIC else np.maximum(1 - x, 0)
    k = np.where(tap < count[:, None], k, 0)
    total = np.cumsum(k, 1)[:, -1:]  # one after another, as Pillow adds them
    return Axis(low.astype(np.int32), count.astype(np.int32), k / np.where(total == 0, 1, total))


def four(before: int, after: int) -> Axis:
    """torch's bicubic without antialias: four taps, a = -0.75, those outside stand for the border."""
    source = (np.arange(after) + 0.5) * (before / after) - 0.5
    start = np.floor(source).astype(np.int64) - 1
    low, high = (np.clip(v, 0, before - 1) for v in (start, start + 3))
    k = np.zeros((after, 4))
    for tap in range(4):
        at = np.clip(start + tap, 0, before - 1) - low
        k[np.arange(after), at] += _cubic(np.abs(tap - 1 - (source - np.floor(source))), -0.75)
    return Axis(low.astype(np.int32), (high - low + 1).astype(np.int32), k)
