"""Experts on CPU: for each of many rows a gather, two library products and what lies between them, all in one workspace.

Experts of few rows go through our kernel together. A token's rows are added up at the end, in the order of its choices. Nothing
of T K F numbers exists unless a gradient will ask for it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels.ops.moe import op, reference
from mmkernels.primitives._op import LIBRARY
from mmkernels.primitives._widen import operand_dtype
from mmkernels.primitives.grouped_linear import composed as linear
from mmkernels.primitives.grouped_linear.composed_backward import add_product
from mmkernels.primitives.grouped_linear.reference import activate, activate_backward
from mmkernels.primitives.grouped_linear.rows import Piece, Rows, parts, pieces, place, plan

CHUNK = 2048  # rows that go through an expert at once
EPILOGUE = 64  # rows

COMBINE = "moe_combine__cpu"
LIBRARY.define(f"{COMBINE}(Tensor y, Tensor? weights, Tensor inverse, int rows, Tensor(a!) out) -> ()")


class Plan(NamedTuple):
    """The kept rows in the experts' order, and the weight of each."""

    rows: Rows
    scale: Tensor


def _plan(x: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> Plan:
    k, m = weights.shape[1], order.shape[0]
    found = order.numpy()
    token = torch.from_numpy(np.where(found < 0, -1, found // max(k, 1)).astype(np.int32))
    rows = plan((x.shape[0], m), counts, token, None, None)
    route = found[: rows.used] if rows.at is None else found[rows.at]
    return Plan(rows, weights.reshape(-1)[torch.from_numpy(route.astype(np.int64))])


class Weights(NamedTuple):
    """One of the experts' two products."""

    weight: Tensor
    bias: Tensor | None


def _counts(rows: Rows, piece: Piece) -> Tensor:
    counts = np.zeros(len(rows.counts), dtype=np.int32)
    for group, own in parts(rows.counts, piece.start, piece.stop):
        counts[group] = own.stop - own.start
    return torch.from_numpy(counts)


def _product(a: Tensor, w: Weights, rows: Rows, piece: Piece, out: Tensor) -> None:
    """out = the piece's rows a, which stand together, times their experts' weights."""
    if piece.group < 0:
        kernel = getattr(torch.ops.mmkernels, linear.KERNEL).default
        kernel(a, w.weight, _counts(rows, piece), None, 0, len(a), out)
    else:
        linear.multiply(a, w.weight[piece.group], out)
    if w.bias is not None:
        for group, own in parts(rows.counts, piece.start, piece.stop):
            out[own] += w.bias[group]


def _widest(rows: Rows, few: int) -> int:
    return max((piece.stop - piece.start for piece in pieces(rows, few, CHUNK)), default=0)


def forward(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator moe_ffn: out, h."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, f, wide = len(order), w_out.shape[2], torch.promote_types(x.dtype, torch.float32)
    rows, _ = _plan(x, weights, order, counts)
    few, dtype = linear.few_of(x), operand_dtype(x)
    most = _widest(rows, few)
    p, a = x.new_empty((most, w_in.shape[1]), dtype=wide), x.new_empty((most, f), dtype=dtype)
    h = (torch.empty if rows.used == m else torch.zeros)((m if keep else 0, w_in.shape[1]), dtype=x.dtype)
    y = (torch.empty if rows.at is None else torch.zeros)((m, w_out.shape[1]), dtype=wide)
    first, second = Weights(w_in, b_in), Weights(w_out, b_out)
    for piece in pieces(rows, few, CHUNK):
        n, at = piece.stop - piece.start, place(rows.at, piece.start, piece.stop)
        inner = x.dtype if piece.group < 0 else dtype
        given = linear.pick(x, place(rows.read, piece.start, piece.stop), inner)
        target = h[at] if keep and isinstance(at, slice) and h.dtype == wide else p[:n]
        _product(given, first, rows, piece, target)
        if keep and target.data_ptr() == p.data_ptr():
            linear.put(h, at, target)
        middle = a[:n] if inner == dtype else x.new_empty((n, f))
        for low in range(0, n, EPILOGUE):
            middle[low : low + EPILOGUE] = activate(target[low : low + EPILOGUE], activation)
        if isinstance(at, slice):
            _product(middle, second, rows, piece, y[at])
        else:
            found = y.new_empty((n, y.shape[1]))
            _product(middle, second, rows, piece, found)
            linear.put(y, at, found)
    return combine(y, weights, inverse, rows, (len(x), x.dtype)), h


def combine(
    y: Tensor, weights: Tensor | None, inverse: Tensor, rows: Rows, like: tuple[int, torch.dtype]
) -> Tensor:
    """out[t] = sum_j weights[t, j] y[inverse[t K + j]], j after j; `like`: the rows and the dtype of out."""
    out = torch.empty((like[0], y.shape[1]), dtype=like[1])
    if y.dtype == torch.float64:
        scale = torch.ones(like[0], len(inverse) // max(like[0], 1)) if weights is None else weights
        return reference.combine(y[: rows.used], scale, inverse).to(like[1])
    scale = weights if weights is None else weights.to(torch.float32).contiguous()
    getattr(torch.ops.mmkernels, COMBINE).default(y, scale, inverse.contiguous(), len(y), out)
    return out


def _through_out(do: Tensor, a: Tensor, plan: Plan, piece: Piece, w: Weights, grads: _Grads) -> Tensor:
    """d of the piece's middle, unweighted rows [m, F]; fills the gradients of w_out, b_out and the weights."""
    rows, scale = plan.rows, plan.scale[piece.start : piece.stop].to(do.dtype).unsqueeze(1)
    da = do.new_empty((len(do), a.shape[1]))
    for group, own in parts(rows.counts, piece.start, piece.stop):
        linear.multiply_back(do[own].to(operand_dtype(a)), w.weight[group], da[own])
    if grads.scale.numel():
        found = (da * a).sum(1)
        for group, own in parts(rows.counts, piece.start, piece.stop):
            if w.bias is not None:
                found[own] += do[own] @ w.bias[group].to(do.dtype)
        linear.put(grads.scale, place(rows.at, piece.start, piece.stop), found)
    if grads.w_out.numel() or grads.b_out.numel():
        _sum_rows(do * scale, a, rows, piece, (grads.w_out, grads.b_out))
    return da.mul_(scale)


def _sum_rows(dy: Tensor, a: Tensor, rows: Rows, piece: Piece, into: tuple[Tensor, Tensor]) -> None:
    """dweight and dbias of each expert in the piece: dy^T a, and the sum of dy."""
    low, given = dy.to(operand_dtype(a)), a.to(operand_dtype(a))
    for group, own in parts(rows.counts, piece.start, piece.stop):
        first = piece.start == int(rows.counts[:group].sum()) or piece.group < 0
        if into[0].numel():
            add_product(low[own], given[own], into[0][group], first)
        if into[1].numel():
            into[1][group] += dy[own].sum(0)


class _Grads(NamedTuple):
    """Gradients being filled, [0] where nobody needs one; `rows` of x's one by one, in the experts' order."""

    rows: Tensor
    scale: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor
    b_out: Tensor


def _empty_grads(inputs: tuple[Tensor | None, ...], needs: list[bool], rows: Rows, m: int) -> _Grads:
    x = inputs[0]
    assert x is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = rows.at is None
    once = int(rows.counts.max(initial=0)) <= CHUNK
    none = x.new_empty(0)

    def weight(t: Tensor | None, need: bool) -> Tensor:
        if t is None or not need:
            return none
        made = torch.empty(t.shape, dtype=t.dtype if once else wide)
        return made.index_fill_(0, torch.from_numpy(np.flatnonzero(rows.counts == 0)), 0)

    def bias(t: Tensor | None, need: bool) -> Tensor:
        return torch.zeros(t.shape, dtype=wide) if t is not None and need else none

    _, _, w_in, w_out, b_in, b_out = inputs
    each = (torch.empty if whole else torch.zeros)((m, x.shape[1]), dtype=wide) if needs[0] else none
    scale = torch.zeros(m, dtype=wide) if needs[1] else none
    weights = weight(w_in, needs[2]), weight(w_out, needs[3])
    return _Grads(each, scale, *weights, bias(b_in, needs[4]), bias(b_out, needs[5]))


def backward(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    h: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The operator moe_ffn_backward."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    found, wide = _plan(x, weights, order, counts), torch.promote_types(x.dtype, torch.float32)
    rows, inputs = found.rows, (x, weights, w_in, w_out, b_in, b_out)
    grads = _empty_grads(inputs, needs, rows, len(order))
    if not len(h):
        h = forward(x, weights, order, inverse, counts, w_in, w_out, b_in, b_out, activation, True)[1]
    for piece in pieces(rows, linear.few_of(x), CHUNK):
        token = place(rows.read, piece.start, piece.stop)
        p = linear.pick(h, place(rows.at, piece.start, piece.stop), wide)
        da = _through_out(
            linear.pick(dout, token, wide),
            activate(p, activation),
            found,
            piece,
            Weights(w_out, b_out),
            grads,
        )
        dh = activate_backward(da, p, activation)
        if grads.w_in.numel() or grads.b_in.numel():
            _sum_rows(dh, linear.pick(x, token, operand_dtype(x)), rows, piece, (grads.w_in, grads.b_in))
        if needs[0]:
            dx = dh.new_empty((len(dh), x.shape[1]))
            for group, own in parts(rows.counts, piece.start, piece.stop):
                linear.multiply_back(dh[own].to(operand_dtype(x)), w_in[group], dx[own])
            linear.put(grads.rows, place(rows.at, piece.start, piece.stop), dx)
    return _finished(grads, inputs, needs, inverse, rows)


def _finished(
    grads: _Grads, inputs: tuple[Tensor | None, ...], needs: list[bool], inverse: Tensor, rows: Rows
) -> tuple[Tensor, ...]:
    """Rows added up by token, weights' gradients by route, everything in its input's dtype."""
    x, weights, *_ = inputs
    assert x is not None and weights is not None
    filled = list(grads)
    if needs[0]:
        filled[0] = combine(grads.rows, None, inverse, rows, (len(x), x.dtype))
    if needs[1]:
        at, padded = inverse.long(), torch.cat([grads.scale, grads.scale.new_zeros(1)])
        m = len(grads.scale)
        filled[1] = padded[torch.where((at >= 0) & (at < m), at, m)].view(weights.shape)
    return tuple(
        g.to(t.dtype) if need and t is not None else x.new_empty(0)
        for g, t, need in zip(filled, inputs, needs, strict=True)
    )


@functools.cache  # asked at every call; modules are loaded before their operators are registered
def _present() -> str:
    for name in (linear.KERNEL, COMBINE):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{name}", "CPU"):
            return f"{name} is not compiled in this installation"
    return ""


op.FORWARD.register("cpu", "cpp", forward, present=_present)
op.BACKWARD.register("cpu", "cpp", backward, present=_present)
