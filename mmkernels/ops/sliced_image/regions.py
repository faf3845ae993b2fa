"""Region pooling, the law: RoIAlign of the boxes that cut each slice's map into g x g. Letters: S slices, P patches.

A slice's map, H x W, is cut into boxes `[j W/g, i H/g, (j + 1) W/g, (i + 1) H/g]`, each box into oh x ow bins, and a bin is the
mean of ceil(bin) x ceil(bin) bilinear samples. All of it is separable: key k = (a, b) = (k // ow, k % ow) of box (i, j) is
`sum_p A[p, i, k] B[p, j, k] x[p]` over the slice's patches.

As published: no half-pixel shift, boxes at least one cell wide, coordinates rounded to the features' dtype; a sample past the
map gives 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.ops.sliced_image.slices import patches_of

POOLS = (
    (4, 2),
    (3, 2),
    (4, 3),
    (3, 3),
    (2, 4),
    (2, 3),
    (3, 4),
)  # (ow, oh), in the order in which they are tried
KEYS = 12  # of a box, at most
_REACH = 5  # samples of a bin that one cell can be read by: they are at least half a cell apart


def pool_size(ratio: float) -> tuple[int, int]:
    """Into how many bins the boxes of a map of this width / height are cut: (ow, oh), the first whose ratio is nearest."""
    best, found = math.inf, POOLS[0]
    for ow, oh in POOLS:
        distance = abs(math.log(ratio) - math.log(ow / oh))
        if distance < best:
            best, found = distance, (ow, oh)
    return found


def pool_sizes(slice_hw: Tensor) -> Tensor:
    """`pool_size` of every slice, int64 [S, 2] as (oh, ow), without the host."""
    h, w = slice_hw.clamp(min=1).to(torch.float64).unbind(1)
    ratio = (w / h).log()
    best = torch.full_like(ratio, torch.inf)
    found = torch.full_like(slice_hw, 1)
    for ow, oh in POOLS:
        distance = (ratio - math.log(ow / oh)).abs()
        nearer = (distance < best).unsqueeze(1)
        best = torch.minimum(best, distance)
        found = torch.where(nearer, torch.tensor([oh, ow], device=found.device), found)
    return found


def axis_weights(
    at: Tensor, size: Tensor, bins: Tensor, bin_of: Tensor, g: int, dtype: torch.dtype
) -> Tensor:
    """What the boxes read along one axis: [P, g, KEYS], for cells `at` [P] of an axis of `size` [P] cut into `bins` [P].

    `bin_of` [P, KEYS] is the bin of each key along this axis. `dtype` is the features', which box edges are rounded to; places
    are float64: weights are their small differences.
    """
    f64 = torch.float64
    edges = (torch.arange(g + 1, device=at.device) * size.unsqueeze(1)).to(f64).div(g).to(dtype).to(f64)
    start, length = edges[:, :-1], (edges[:, 1:] - edges[:, :-1]).clamp(min=1)
    one = length / bins.unsqueeze(1)  # of a bin
    samples = one.ceil()
    apart = (one / samples).unsqueeze(2)
    begin = start.unsqueeze(2) + bin_of.unsqueeze(1) * one.unsqueeze(2)
    cell, last = at.to(f64)[:, None, None], (size - 1).to(f64)[:, None, None]
    # the last cell answers for the rest of the map, whose samples stand up to one cell further
    first = ((cell - 1 - begin) / apart - 0.5).floor().clamp(min=0)
    found = torch.zeros_like(begin)
    for n in range(_REACH):
        k = first + n
        place = begin + (k + 0.5) * apart
        near = (1 - (torch.minimum(place.clamp(min=0), last) - cell).abs()).clamp(min=0)
        found = found + torch.where((k < samples.unsqueeze(2)) & (place <= last + 1), near, 0)
    return (found / samples.unsqueeze(2)).to(torch.promote_types(dtype, torch.float32))


def box_weights(slice_hw: Tensor, patches: int, g: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A and B [P, g, KEYS] (0 for keys that a slice's boxes do not have), and every patch's slice [P]."""
    at = patches_of(slice_hw, patches)
    oh, ow = torch.cat([pool_sizes(slice_hw), slice_hw.new_ones(1, 2)])[at.slice].unbind(1)
    k = torch.arange(KEYS, device=slice_hw.device)
    row = torch.div(k, ow.unsqueeze(1), rounding_mode="floor")
    a = axis_weights(at.y, at.h, oh, row, g, dtype)
    b = axis_weights(at.x, at.w, ow, k % ow.unsqueeze(1), g, dtype)
    real = (k < (oh * ow).unsqueeze(1)).unsqueeze(1)
    return torch.where(real, a, 0), b, at.slice


def forward(x: Tensor, slice_hw: Tensor, g: int) -> Tensor:
    """[S, g g, KEYS, C] in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b, owner = box_weights(slice_hw, x.shape[0], g, x.dtype)
    reads = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)  # [P, g g KEYS]
    found = x.new_zeros(slice_hw.shape[0], reads.shape[1], x.shape[1], dtype=wide)
    for s in range(slice_hw.shape[0]):
        own = (owner == s).unsqueeze(1)
        found[s] = torch.where(own, reads, 0).T @ torch.where(own, x, 0).to(wide)
    return found.to(x.dtype).view(slice_hw.shape[0], g * g, KEYS, x.shape[1])


def backward(dout: Tensor, x: Tensor, slice_hw: Tensor, g: int) -> Tensor:
    """dx [P, C]: every patch gathers from the keys that read it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b, owner = box_weights(slice_hw, x.shape[0], g, x.dtype)
    reads = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
    found = torch.zeros(x.shape, dtype=wide, device=x.device)
    for s in range(slice_hw.shape[0]):
        own = (owner == s).unsqueeze(1)
        found = torch.where(own, reads @ dout[s].flatten(0, 1).to(wide), found)
    return found.to(x.dtype)
