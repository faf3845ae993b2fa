"""The patch embedding, the law (see reference.py): one product, and in its epilogue the stretched positions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import reference
from mmkernels.ops.sliced_image.interpolation import Rule, weights
from mmkernels.ops.sliced_image.slices import patches_of


def reads(slice_hw: Tensor, patches: int, grid: list[int], rule: Rule, dtype: torch.dtype) -> Tensor:
    """What each patch reads of the table: [P, G], G = grid[0] grid[1]."""
    at, (gh, gw) = patches_of(slice_hw, patches), grid
    same = (at.h == gh) & (at.w == gw)
    y = weights(at.y, at.h, same, gh, rule, dtype)
    x = weights(at.x, at.w, same, gw, rule, dtype)
    return (y.unsqueeze(2) * x.unsqueeze(1)).flatten(1)


def places(slice_hw: Tensor, patches: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Where patches [P] and prefix rows [S Q] stand in the output."""
    s = torch.arange(slice_hw.shape[0], device=slice_hw.device)
    area = slice_hw[:, 0] * slice_hw[:, 1]
    first = area.cumsum(0) - area + s * prefix
    rows = first.unsqueeze(1) + torch.arange(prefix, device=slice_hw.device)
    p = torch.arange(patches, device=slice_hw.device)
    return p + (patches_of(slice_hw, patches).slice + 1) * prefix, rows.flatten()


def forward(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    prefix: Tensor | None,
    slice_hw: Tensor,
    grid: list[int],
    mode: str,
    align_corners: bool,
    antialias: bool,
    offset: float | None,
) -> Tensor:
    """[P + S Q, C] in the patches' dtype."""
    x, w, b, table, first = reference._wide(patches, weight, bias, positions, prefix)
    out = x @ w.T
    if bias is not None:
        out = out + b
    if positions is not None:
        rule = Rule(mode, align_corners, antialias, offset)
        out = out + reads(slice_hw, x.shape[0], grid, rule, x.dtype) @ table.to(x.dtype)
    out = out.to(patches.dtype)
    if prefix is None:
        return out
    q, c = prefix.shape
    at, before = places(slice_hw, x.shape[0], q)
    whole = out.new_zeros(x.shape[0] + len(before), c)
    whole = whole.index_copy(0, at, out)
    return whole.index_copy(0, before, first.to(out.dtype).repeat(slice_hw.shape[0], 1))


def backward(
    dout: Tensor,
    patches: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    prefix: Tensor | None,
    slice_hw: Tensor,
    grid: list[int],
    mode: str,
    align_corners: bool,
    antialias: bool,
    offset: float | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """dpatches, dweight, dbias, dpositions, dprefix."""
    do, x, w = reference._wide(dout, patches, weight)
    dprefix = dtable = None
    if prefix is not None:
        at, before = places(slice_hw, x.shape[0], prefix.shape[0])
        dprefix = do[before].view(-1, *prefix.shape).sum(0)
        do = do[at]
    if positions is not None and needs[3]:
        rule = Rule(mode, align_corners, antialias, offset)
        dtable = reads(slice_hw, x.shape[0], grid, rule, x.dtype).T @ do
    grads = (do @ w if needs[0] else None, do.T @ x if needs[1] else None, do.sum(0), dtable, dprefix)
    return reference._like(grads, (patches, weight, bias, positions, prefix), needs)
