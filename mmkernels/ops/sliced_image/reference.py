"""Packed slices of any size, the law. Letters: S slices, P patches, K numbers of a patch, C channels, Q prefix rows, G cells.

    embed[p]   = W patch[p] + b + sum_ij Y[p, i] X[p, j] positions[i, j]        before each slice its Q prefix rows
    attend[t]  = softmax(scale q[t] k^T) v over the rows of t's own slice
    lora[r]    = base[r] + (x[r] a[w]^T) b[w]^T       w = segment[r]; -1: base[r]
    splice[t]  = visual[i] for i = index[t] >= 0, tokens[t] for -1, special[-2 - i] below

Widened to float32 (float64 stays).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.primitives.interval_attention import reference as interval


def _wide(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(
        t if t is None else t.to(torch.promote_types(t.dtype, torch.float32))  # type: ignore[misc]
        for t in tensors
    )


def _like(
    grads: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients in their inputs' dtypes, contiguous; [0] for one that nobody needs."""
    first = inputs[0]
    assert first is not None
    return tuple(
        g.to(x.dtype).contiguous() if need and g is not None and x is not None else first.new_empty(0)
        for g, x, need in zip(grads, inputs, needs, strict=True)
    )


# ---- attention


def intervals(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """lo and hi [T], int32: each row's own slice."""
    t = torch.arange(rows, device=offsets.device, dtype=torch.int32)
    s = torch.searchsorted(offsets[1:].contiguous(), t, right=True)
    edges = torch.cat([offsets, offsets[-1:]])
    return edges[s].clamp(max=rows), edges[s + 1].clamp(max=rows)


def _rules(offsets: Tensor, rows: int, scale: float) -> tuple[object, ...]:
    lo, hi = (x.unsqueeze(0) for x in intervals(offsets, rows))
    return lo, hi, None, None, None, scale, 0.0


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [T, H, D], lse [H, T]."""
    rules = _rules(offsets, q.shape[0], scale)
    out, lse = interval.forward(*(x.unsqueeze(0) for x in (q, k, v)), *rules)
    return out.squeeze(0), lse.squeeze(0)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rules = _rules(offsets, q.shape[0], scale)
    dout, q, k, v, out, lse = (x.unsqueeze(0) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = interval.backward(dout, None, q, k, v, out, lse, *rules)
    return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)


# ---- per-window LoRA


def lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """out [R, N] in base's dtype, t [R, r] wide: the rows' products with their windows' a, 0 where there is none."""
    x_, a_, b_, out = _wide(x, a, b, base)
    t = x_.new_zeros(x.shape[0], a.shape[1])
    for w in range(a.shape[0]):
        own = (segment == w).unsqueeze(1)
        t = torch.where(own, x_ @ a_[w].T, t)
    for w in range(a.shape[0]):
        own = (segment == w).unsqueeze(1)
        out = torch.where(own, out + t @ b_[w].T, out)
    return out.to(base.dtype).clone(memory_format=torch.contiguous_format), t


def lora_backward(
    dout: Tensor, x: Tensor, a: Tensor, b: Tensor, segment: Tensor, t: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """dx, da, db."""
    do, x_, a_, b_ = _wide(dout, x, a, b)
    dx, da, db = torch.zeros_like(x_), torch.zeros_like(a_), torch.zeros_like(b_)
    for w in range(a.shape[0]):
        own = (segment == w).unsqueeze(1)
        dy = torch.where(own, do, 0).to(x_.dtype)
        dt = dy @ b_[w]
        db[w] = dy.T @ t
        da[w] = dt.T @ torch.where(own, x_, 0)
        dx = torch.where(own, dt @ a_[w], dx)
    return _like((dx, da, db), (x, a, b), needs)


# ---- splicing


def _picks(index: Tensor, rows: int) -> Tensor:
    return (index >= 0) & (index < rows)


def splice(tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor) -> Tensor:
    """out [T, C] in tokens' dtype."""
    found = tokens
    for rows, i in ((visual, index), (special, -2 - index)):
        if rows is not None and rows.shape[0]:
            row = rows[i.clamp(0, rows.shape[0] - 1).long()].to(tokens.dtype)
            found = torch.where(_picks(i, rows.shape[0]).unsqueeze(1), row, found)
    return found.clone(memory_format=torch.contiguous_format)


def splice_backward(
    dout: Tensor, tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """dtokens, dvisual, dspecial: rows that are used twice add up in order."""
    (do,) = _wide(dout)
    taken, dspecial = _picks(index, visual.shape[0]), None
    if special is not None:
        taken = taken | _picks(-2 - index, special.shape[0])
        dspecial = _gathered(do, -2 - index, special.shape[0])
    dtokens = torch.where(taken.unsqueeze(1), 0, dout)
    dvisual = _gathered(do, index, visual.shape[0])
    return _like((dtokens, dvisual, dspecial), (tokens, visual, special), needs)


def _gathered(dout: Tensor, index: Tensor, rows: int) -> Tensor:
    """grad[i] = sum of dout[t] over index[t] = i."""
    some = _picks(index, rows)
    place = torch.where(some, index, rows).long()
    grad = dout.new_zeros(rows + 1, dout.shape[1])
    return grad.index_add(0, place, torch.where(some.unsqueeze(1), dout, 0))[:rows]
