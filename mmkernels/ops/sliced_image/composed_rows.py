"""Patch embedding and per-window LoRA on CPU: library products, and what follows them a few rows at a time, in cache.

Slices of one size share one stretched table, which two small products make: along the columns, then along the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import lora, op
from mmkernels.ops.sliced_image.composed import present
from mmkernels.ops.sliced_image.interpolation import Rule, weights
from mmkernels.primitives._widen import operand

BLOCK = 1 << 18  # wide numbers that one step leaves in cache, where the output is of 16 bits

Size = tuple[int, int]


def _sizes(slice_hw: Tensor) -> list[Size]:
    return [(h, w) for h, w in slice_hw.tolist()]


def _axes(size: Size, grid: list[int], rule: Rule, like: Tensor) -> tuple[Tensor, Tensor]:
    """What rows and columns of a slice read: [h, grid rows], [w, grid columns]."""
    same, found = size == tuple(grid), []
    for n, g in zip(size, grid, strict=True):
        sizes = torch.full((n,), n)
        found.append(weights(torch.arange(n), sizes, torch.full((n,), same), g, rule, like.dtype))
    return found[0], found[1]


def _stretched(table: Tensor, size: Size, grid: list[int], rule: Rule) -> Tensor:
    """[h w, C] of a wide table [G, C]."""
    rows, columns = _axes(size, grid, rule, table)
    tall = rows @ table.view(grid[0], -1)
    return torch.matmul(columns, tall.view(size[0], grid[1], -1)).flatten(0, 1)


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
    """The operator slice_patch_embed."""
    wide, rule = (
        torch.promote_types(patches.dtype, torch.float32),
        Rule(mode, align_corners, antialias, offset),
    )
    c, q = weight.shape[0], 0 if prefix is None else prefix.shape[0]
    out = torch.empty((patches.shape[0] + q * len(slice_hw), c), dtype=patches.dtype)
    w, tables = operand(weight).t(), {}
    added = torch.zeros((1, c), dtype=wide) if bias is None else bias.to(wide).unsqueeze(0)
    start = to = 0
    for size in _sizes(slice_hw):
        if prefix is not None:
            out[to : to + q] = prefix
        area, to = size[0] * size[1], to + q
        if size not in tables and positions is not None and area:
            tables[size] = _stretched(positions.to(wide), size, grid, rule) + added
        table = tables.get(size, added).expand(area, c)
        _affine(patches[start : start + area], w, table, out[to : to + area])
        start, to = start + area, to + area
    return out


def _affine(a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> None:
    """out = a b + c, c being wide; rows of another dtype a few at a time, so that what is wide stays in cache."""
    if out.dtype == b.dtype == c.dtype:
        torch.addmm(c, operand(a), b, out=out)
        return
    step = max(1, BLOCK // max(out.shape[1], 1))
    for rows in (slice(at, at + step) for at in range(0, len(out), step)):
        x = operand(a[rows])
        out[rows] = torch.addmm(c[rows], x, b) if x.dtype == c.dtype else c[rows] + torch.mm(x, b)


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
    """The operator slice_patch_embed_backward: the gradients of slices of one size are added up before they shrink."""
    wide, rule = (
        torch.promote_types(patches.dtype, torch.float32),
        Rule(mode, align_corners, antialias, offset),
    )
    q, c = 0 if prefix is None else prefix.shape[0], weight.shape[0]
    sums: dict[Size, Tensor] = {}
    dprefix = torch.zeros((q, c), dtype=wide)
    parts, to = [], 0
    for size in _sizes(slice_hw):
        area = size[0] * size[1]
        if needs[4]:
            dprefix += dout[to : to + q]
        part = dout[to + q : to + q + area]
        parts.append(part)
        if needs[3] and area:
            sums[size] = sums[size].add_(part) if size in sums else part.to(wide, copy=True)
        to += q + area
    rows = dout if q == 0 else torch.cat([dout[:0], *parts])
    grads: list[Tensor | None] = [None, None, rows.sum(0, dtype=wide) if needs[2] else None, None, dprefix]
    d = operand(rows)
    if needs[0]:
        grads[0] = d @ operand(weight)
    if needs[1]:
        grads[1] = d.t() @ operand(patches)
    if needs[3] and positions is not None:
        grads[3] = torch.zeros(positions.shape, dtype=wide)
        for size, total in sums.items():
            tall, wide_ = _axes(size, grid, rule, total)
            narrow = torch.matmul(wide_.t(), total.view(*size, -1))  # [h, grid columns, C]
            grads[3] += (tall.t() @ narrow.flatten(1)).view(positions.shape)
    inputs = (patches, weight, bias, positions, prefix)
    return tuple(
        g.to(x.dtype) if need and g is not None and x is not None else patches.new_empty(0)
        for g, x, need in zip(grads, inputs, needs, strict=True)
    )


# ---- per-window LoRA


def _windows(segment: Tensor) -> Iterator[tuple[int, slice]]:
    """Runs of rows of one window: (window, rows)."""
    at = 0
    for window, run in groupby(segment.tolist()):
        length = sum(1 for _ in run)
        yield window, slice(at, at + length)
        at += length


def _scattered(segment: Tensor, windows: int) -> bool:
    """Whether windows stand in many short runs: their rows are then brought together first."""
    changes = int((segment[1:] != segment[:-1]).sum()) if len(segment) else 0
    return changes > max(windows, len(segment) // 32)


def forward_lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """The operator segment_lora."""
    if _scattered(segment, a.shape[0]):
        order = segment.argsort(stable=True)
        out, t = forward_lora(x[order], base[order], a, b, segment[order].contiguous())
        return torch.empty_like(out).index_copy_(0, order, out), torch.empty_like(t).index_copy_(0, order, t)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(base.shape, dtype=base.dtype)
    t = torch.zeros((x.shape[0], a.shape[1]), dtype=wide)
    for window, run in _windows(segment):
        if not 0 <= window < a.shape[0]:
            out[run] = base[run]
            continue
        torch.mm(x[run].to(wide), a[window].to(wide).t(), out=t[run])
        up = b[window].to(wide).t()
        if out.dtype == wide:
            torch.addmm(base[run], t[run], up, out=out[run])
            continue
        step = max(1, BLOCK // max(base.shape[1], 1))
        for start in range(run.start, run.stop, step):
            rows = slice(start, min(run.stop, start + step))
            out[rows] = torch.addmm(base[rows].to(wide), t[rows], up)
    return out, t


def backward_lora(
    dout: Tensor, x: Tensor, a: Tensor, b: Tensor, segment: Tensor, t: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """The operator segment_lora_backward: two thin products for each window."""
    if _scattered(segment, a.shape[0]):
        order = segment.argsort(stable=True)
        dx, da, db = backward_lora(dout[order], x[order], a, b, segment[order].contiguous(), t[order], needs)
        return torch.empty_like(dx).index_copy_(0, order, dx) if needs[0] else dx, da, db
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, da, db = (
        torch.zeros(g.shape, dtype=wide) if need else g.new_empty(0)
        for g, need in zip((x, a, b), needs, strict=True)
    )
    for window, run in _windows(segment):
        if not 0 <= window < a.shape[0]:
            continue
        dy = dout[run].to(wide)
        if needs[2]:
            db[window].addmm_(dy.t(), t[run])
        if not (needs[0] or needs[1]):
            continue
        dt = dy @ b[window].to(wide)
        if needs[0]:
            torch.mm(dt, a[window].to(wide), out=dx[run])
        if needs[1]:
            da[window].addmm_(dt.t(), x[run].to(wide))
    return tuple(g.to(x.dtype) for g in (dx, da, db))


op.FORWARD.register("cpu", "cpp", forward, present=present)
op.BACKWARD.register("cpu", "cpp", backward, present=present)
lora.FORWARD.register("cpu", "cpp", forward_lora, present=present)
lora.BACKWARD.register("cpu", "cpp", backward_lora, present=present)
