"""How a table of a grid stretches to slices of other sizes: for every patch and each of its two axes, what it reads.

Letters: P patches, g cells of the table along the axis. Every published convention is separable: the position of a patch is
`sum_ij Y[p, i] X[p, j] table[i, j]`. The arithmetic follows torch.nn.functional.interpolate step by step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("bicubic", "bilinear")


class Rule(NamedTuple):
    """`offset` None: the ratio of the sizes; a number o: the ratio that `scale_factor=(n + o) / g` gives."""

    mode: str
    align_corners: bool
    antialias: bool
    offset: float | None


def weights(at: Tensor, size: Tensor, same: Tensor, g: int, rule: Rule, dtype: torch.dtype) -> Tensor:
    """What patches at the places `at` [P] of an axis of `size` [P] read of the table's g cells: [P, g].

    `same` [P]: the slice has the table's size both ways; a scale factor is then not used.
    """
    i, n = at.to(dtype), size.clamp(min=1).to(dtype)
    if rule.align_corners:
        step = torch.where(size > 1, (g - 1) / (n - 1).clamp(min=1), 0)
        source = step * i
    else:
        o = 0.0 if rule.offset is None else rule.offset
        step = torch.where(same, 1, g / (n + o) if o == 0 else 1 / ((n + o) / g))
        source = step * (i + 0.5) - 0.5
    if rule.antialias:
        return _filtered(step, i, g, rule.mode)
    return _cubic(source, g) if rule.mode == "bicubic" else _linear(source, g)


def _near(x: Tensor, a: float) -> Tensor:
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _far(x: Tensor, a: float) -> Tensor:
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a


def _spread(taps: list[tuple[Tensor, Tensor]], g: int) -> Tensor:
    """Taps (cell [P], weight [P]) as [P, g]; cells past an edge count as the edge's."""
    cells = torch.arange(g, device=taps[0][0].device)
    found = torch.zeros(taps[0][1].shape[0], g, dtype=taps[0][1].dtype, device=cells.device)
    for cell, weight in taps:
        found = found + torch.where(cell.clamp(0, g - 1).unsqueeze(1) == cells, weight.unsqueeze(1), 0)
    return found


def _cubic(source: Tensor, g: int) -> Tensor:
    first = source.floor()
    t, i = (source - first).clamp(0, 1), first.long()
    taps = (_far(t + 1, -0.75), _near(t, -0.75), _near(1 - t, -0.75), _far(2 - t, -0.75))
    return _spread([(i - 1 + k, weight) for k, weight in enumerate(taps)], g)


def _linear(source: Tensor, g: int) -> Tensor:
    source = source.clamp(min=0)
    i = source.long().clamp(max=g - 1)
    t = (source - i).clamp(0, 1)
    return _spread([(i, 1 - t), (i + 1, t)], g)


def _filtered(step: Tensor, i: Tensor, g: int, mode: str) -> Tensor:
    """The antialiased filter: as wide as the step where that shrinks, its weights adding up to 1."""
    radius = 2.0 if mode == "bicubic" else 1.0
    wide = step.clamp(min=1)
    support, center = radius * wide, step * (i + 0.5)
    first = (center - support + 0.5).trunc().clamp(min=0).unsqueeze(1)
    last = (center + support + 0.5).trunc().clamp(max=g).unsqueeze(1)
    j = torch.arange(g, device=i.device, dtype=step.dtype)
    x = ((j + 0.5 - center.unsqueeze(1)) / wide.unsqueeze(1)).abs()
    if mode == "bicubic":
        found = torch.where(x < 1, _near(x, -0.5), torch.where(x < 2, _far(x, -0.5), 0))
    else:
        found = (1 - x).clamp(min=0)
    found = torch.where((j >= first) & (j < last), found, 0)
    total = found.sum(1, keepdim=True)
    return found / torch.where(total == 0, 1, total)
