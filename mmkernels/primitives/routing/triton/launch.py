"""Routing on the GPU: launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.primitives.routing import reference
from mmkernels.primitives.routing.triton import kernels

ROWS, GROUPS, WARPS = 256, 32, 4


def route(groups: Tensor, num_groups: int, tile: int) -> tuple[Tensor, ...]:
    """The operator route_groups: two launches around a prefix sum, and the tile table."""
    groups, r, e = groups.contiguous(), groups.shape[0], num_groups
    blocks = triton.cdiv(r, ROWS)
    found = groups.new_empty((blocks, e))
    order, inverse = groups.new_full((r,), -1), groups.new_empty(r)
    sizes = {"EP": triton.cdiv(e, GROUPS) * GROUPS, "ROWS": ROWS, "GROUPS": GROUPS, "num_warps": WARPS}
    with torch.cuda.device_of(groups):
        if blocks:
            kernels.count[(blocks,)](groups, found, r, e, **sizes)
        counts = found.sum(0, dtype=torch.int32)
        offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        first = found.cumsum(0, dtype=torch.int32) - found + offsets[:-1]
        if blocks:
            kernels.place[(blocks,)](groups, first, order, inverse, r, e, **sizes)
    return counts, offsets, order, inverse, *reference.tiles_of(counts, offsets, r, tile)
