"""The gradients of composed.py, by the same library products; every sum in the order of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmkernels.primitives._widen import operand_dtype
from mmkernels.primitives.grouped_linear import reference
from mmkernels.primitives.grouped_linear.composed import (
    CHUNK,
    EPILOGUE,
    WIDE_BLOCK,
    Weights,
    few_of,
    forward,
    multiply_back,
    pick,
    put,
    weights_of,
)
from mmkernels.primitives.grouped_linear.rows import Piece, Rows, parts, pieces, place, plan


@dataclass
class _Grads:
    """Gradients being filled, [0] where nobody needs one. Sums over pieces are wide until the end."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    residual: Tensor
    lora_a: Tensor
    lora_b: Tensor
    adds: bool  # rows of x that are read twice: dx is a sum


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_counts: Tensor | None,
    h: Tensor,
    activation: str,
    rows: int,
    needs: list[bool],
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The operator grouped_linear_backward: dx, dweight, dbias, drow_scale, dresidual, dlora_a, dlora_b.

    Given `into`, dx is written there, in the rows that are read, none of them twice.
    """
    if (activation or row_scale is not None) and not len(h):
        first = (x, weight, counts, gather, scatter, bias, None, None, lora_a, lora_b, lora_counts)
        h = forward(*first, "", rows, True)[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    w = weights_of(x, weight, bias, lora_a, lora_b)
    kept = plan((x.shape[0], rows), counts, gather, scatter, lora_counts)
    inputs = (x, weight, bias, row_scale, residual, lora_a, lora_b)
    own = needs if into is None else [False, *needs[1:]]
    grads = _empty_grads(inputs, own, kept, rows)
    if into is not None and needs[0]:
        grads.x = into
    for piece in pieces(kept, few_of(x), CHUNK):
        dh = _epilogue(dout, h, row_scale, kept, piece, activation, grads)
        through = _through_weight if piece.group >= 0 else _through_weights
        da = through(dh, w, kept, piece, grads)
        if kept.segments is not None:
            _through_lora(dh, da, w, kept, piece, grads)
        if da is not None:
            _add_rows(da, place(kept.read, piece.start, piece.stop), grads)
    found = (grads.x, grads.weight, grads.bias, grads.scale, grads.residual, grads.lora_a, grads.lora_b)
    return tuple(
        g.to(t.dtype) if need and t is not None else x.new_empty(0)
        for g, t, need in zip(found, inputs, needs, strict=True)
    )


def _empty_grads(inputs: tuple[Tensor | None, ...], needs: list[bool], kept: Rows, rows: int) -> _Grads:
    """Zeros where not every number will be written."""
    x = inputs[0]
    assert x is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    adds = kept.read is not None and kept.used > 0 and int(np.bincount(kept.read).max()) > 1
    filled = {0: kept.used == len(x) and not adds, 1: True, 4: kept.used == rows}
    once = {0: not adds, 1: int(kept.counts.max()) <= CHUNK, 4: True}  # written once: no sum to keep wide

    def make(i: int, t: Tensor | None) -> Tensor:
        if t is None or not needs[i]:
            return x.new_empty(0)
        new = torch.empty if filled.get(i) else torch.zeros
        return new(t.shape, dtype=t.dtype if once.get(i) else torch.promote_types(t.dtype, wide))

    first, *others = (make(i, t) for i, t in enumerate(inputs))
    grads = _Grads(first, *others, adds=adds)
    if grads.weight.numel():
        # by places: a boolean mask would read and write the whole gradient once more
        grads.weight.index_fill_(0, torch.from_numpy(np.flatnonzero(kept.counts == 0)), 0)
    return grads


def _epilogue(
    dout: Tensor,
    h: Tensor,
    row_scale: Tensor | None,
    kept: Rows,
    piece: Piece,
    activation: str,
    grads: _Grads,
) -> Tensor:
    """d of the piece's products [m, N], wide and contiguous; fills the gradients of row_scale and residual."""
    _, start, stop = piece
    to = place(kept.write, start, stop)
    wide = torch.promote_types(dout.dtype, torch.float32)
    do = pick(dout, to, wide).contiguous()
    if grads.residual.numel():
        put(grads.residual, to, do)
    if not activation and row_scale is None:
        return do
    dh = do.new_empty((stop - start, h.shape[1]))
    for low in range(0, stop - start, EPILOGUE):
        rows = slice(low, min(low + EPILOGUE, stop - start))
        d, here = do[rows], place(kept.at, start + rows.start, start + rows.stop)
        p = pick(h, here, d.dtype)
        if row_scale is not None:
            if grads.scale.numel():
                put(grads.scale, here, (d * reference.activate(p, activation)).sum(1))
            d = d * pick(row_scale, here, d.dtype).unsqueeze(1)
        dh[rows] = reference.activate_backward(d, p, activation)
    return dh


def _through_weight(dh: Tensor, w: Weights, kept: Rows, piece: Piece, grads: _Grads) -> Tensor | None:
    """Fills dweight and dbias; the gradient of the piece's rows of x, wide, unless it already stands in its place."""
    group, start, stop = piece
    if grads.bias.numel():
        grads.bias[group] += dh.sum(0)
    low, at = dh.to(operand_dtype(w.x)), place(kept.read, start, stop)
    if grads.weight.numel():
        first = start == int(kept.counts[:group].sum())
        add_product(low, pick(w.x, at, low.dtype), grads.weight[group], first)
    if not grads.x.numel():
        return None
    straight = isinstance(at, slice) and not grads.adds and kept.segments is None
    if straight and grads.x.dtype == low.dtype:
        multiply_back(low, w.weight[group], grads.x[at])
        return None
    da = low.new_empty((stop - start, w.x.shape[1]), dtype=w.wide)
    multiply_back(low, w.weight[group], da)
    return da


def _through_weights(dh: Tensor, w: Weights, kept: Rows, piece: Piece, grads: _Grads) -> Tensor | None:
    """The same for groups of few rows: all rows are moved at once, so that a group costs its two products and no more."""
    own = [(group, rows.stop - rows.start) for group, rows in parts(kept.counts, piece.start, piece.stop)]
    groups, sizes = [group for group, _ in own], [size for _, size in own]
    if grads.bias.numel():
        grads.bias.index_add_(0, torch.from_numpy(np.repeat(groups, sizes)), dh)
    low = dh.to(operand_dtype(w.x))
    dys = low.split(sizes)
    if grads.weight.numel():
        a = pick(w.x, place(kept.read, piece.start, piece.stop), low.dtype)
        into = grads.weight.unbind()
        for group, dy, rows in zip(groups, dys, a.split(sizes), strict=True):
            add_product(dy, rows, into[group], True)
    if not grads.x.numel():
        return None
    da = low.new_empty((len(dh), w.x.shape[1]), dtype=w.wide)
    weights = w.weight.unbind()
    for group, dy, rows in zip(groups, dys, da.split(sizes), strict=True):
        multiply_back(dy, weights[group], rows)
    return da


def add_product(dy: Tensor, a: Tensor, grad: Tensor, first: bool) -> None:
    """grad (+)= dy^T a; narrowed, when it is, a block at a time."""
    if grad.dtype == dy.dtype:
        if first:
            torch.mm(dy.t(), a, out=grad)
        else:
            grad.addmm_(dy.t(), a)
        return
    step = max(1, WIDE_BLOCK // max(a.shape[1], 1))
    for n in range(0, dy.shape[1], step):
        more = torch.mm(dy[:, n : n + step].t(), a)
        grad[n : n + step] = more if first else more + grad[n : n + step]


def _through_lora(dh: Tensor, da: Tensor | None, w: Weights, kept: Rows, piece: Piece, grads: _Grads) -> None:
    """Fills the gradients of a and b, and adds to that of the rows of x."""
    assert kept.segments is not None and w.lora_a is not None and w.lora_b is not None
    x = pick(w.x, place(kept.read, piece.start, piece.stop), w.wide)
    for s, own in parts(kept.segments, piece.start, piece.stop):
        a, b = w.lora_a[s].to(w.wide), w.lora_b[s].to(w.wide)
        dt = dh[own] @ b
        if grads.lora_a.numel():
            grads.lora_a[s].addmm_(dt.t(), x[own])
        if grads.lora_b.numel():
            grads.lora_b[s].addmm_(dh[own].t(), x[own] @ a.t())
        if da is not None:
            da[own].addmm_(dt, a)


def _add_rows(da: Tensor, at: slice | Tensor, grads: _Grads) -> None:
    if not grads.adds:
        put(grads.x, at, da)
    elif isinstance(at, slice):
        grads.x[at] += da
    else:
        grads.x.index_add_(0, at, da)
