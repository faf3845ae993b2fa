"""Interval attention, the law. Letters: B batch, T query rows (Tq), J keys (Tk), H heads, G key heads, D head width.

    s[t,h,j] = scale <q[t,h], k[j,g]> + slope[h] (j - (hi[t] - 1))        g = h // (H / G)
    p[t,h,:] = softmax of s over lo[t] <= j < hi[t]                        a uniform row: 1 / (hi[t] - lo[t])
    out[t,h] = sum_j p[t,h,j] v[j,g]                                       an empty row: 0, lse = -inf

Widened to float32 (float64 stays). Keys and values that no row sees are zeroed first, by selection: NaN times 0 is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF


class _Weights(NamedTuple):
    """What both passes need, widened. Shapes: q [B,H,T,D], k and v [B,H,J,D], the rest broadcast to [B,H,T,J]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    seen: Tensor
    keep: Tensor | float
    learns: Tensor  # [B,1,T,1] rows whose scores carry gradient: neither empty nor uniform


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash on int64 tensors: every bit of x reaches every bit of the result."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _M32
    return x ^ (x >> 16)


def dropout_keep(seed: Tensor, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """bool [B,H,T,J]: kept iff hash(seed, row, head, key) >= p 2^32. The same bits on every backend."""
    b, h, t, j = shape
    at = {"device": seed.device, "dtype": torch.int64}
    folded = (seed.view(1) & _M32) ^ _mix((seed.view(1) >> 32) & _M32)
    row = torch.arange(b * t, **at).view(b, 1, t, 1)
    head = torch.arange(h, **at).view(1, h, 1, 1)
    state = _mix(((row * h + head) & _M32) ^ _mix(folded))
    return _mix(state ^ torch.arange(j, **at)) >= int(p * 4294967296.0)


def _weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    uniform: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> _Weights:
    wide = torch.promote_types(q.dtype, torch.float32)
    b, t, h, _ = q.shape
    keys, group = k.shape[1], h // k.shape[2]
    lo = lo.clamp(0, keys).view(b, 1, t, 1)
    hi = torch.maximum(hi.clamp(0, keys).view(b, 1, t, 1), lo)
    j = torch.arange(keys, device=q.device)
    seen = (j >= lo) & (j < hi)
    learns = hi > lo
    if uniform is not None:
        learns = learns & ~uniform.view(b, 1, t, 1)
    covered = seen.any(2).view(b, keys, 1, 1)
    q = torch.where(learns, q.transpose(1, 2), 0).to(wide)
    k = torch.where(covered, k, 0).to(wide).repeat_interleave(group, 2).transpose(1, 2)
    v = torch.where(covered, v, 0).to(wide).repeat_interleave(group, 2).transpose(1, 2)
    scores = q @ k.transpose(2, 3) * scale
    if alibi_slopes is not None:
        bias = alibi_slopes.to(wide).view(1, h, 1, 1) * (j - (hi - 1)).to(wide)
        scores = scores + torch.where(learns, bias, 0)
    scores = torch.where(seen, scores, torch.finfo(wide).min)
    keep: Tensor | float = 1.0
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_keep(seed, dropout_p, (b, h, t, keys)).to(wide) / (1 - dropout_p)
    return _Weights(q, k, v, scores, seen, keep, learns)


def _softmax(w: _Weights) -> tuple[Tensor, Tensor]:
    """Probabilities [B,H,T,J] (all zero on an empty row) and log-sum-exp [B,H,T]."""
    if w.scores.shape[-1] == 0:
        return w.scores, w.scores.new_full(w.scores.shape[:-1], -torch.inf)
    top = w.scores.amax(-1, keepdim=True)
    e = (w.scores - top).exp() * w.seen
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, top + total.log())
    return e / torch.where(empty, 1, total), lse.squeeze(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    """out [B,Tq,H,D] in q's dtype, lse [B,H,Tq] widened. `rules`: lo, hi, uniform, alibi_slopes, seed, scale, dropout_p."""
    w = _weights(q, k, v, *rules)
    p, lse = _softmax(w)
    out = (p * w.keep) @ w.v
    return out.transpose(1, 2).to(
        q.dtype, memory_format=torch.contiguous_format
    ).contiguous(), lse.contiguous()


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. With delta[t] = sum_j p dp: ds = p (dp - delta + dlse), dq = scale ds k, dk = scale ds^T q, dv = p^T dout.

    `out` and `lse` are what faster kernels start from; the law recomputes them.
    """
    w = _weights(q, k, v, *rules)
    scale = rules[-2]
    p, _ = _softmax(w)
    rows = w.seen.any(-1, keepdim=True)
    do = torch.where(rows, dout.transpose(1, 2), 0).to(w.q.dtype)
    dp = do @ w.v.transpose(2, 3) * w.keep
    delta = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - torch.where(rows, dlse.unsqueeze(-1), 0)
    ds = torch.where(w.learns, p * (dp - delta), 0) * scale
    dv = (p * w.keep).transpose(2, 3) @ do
    return (_tokens_first(ds @ w.k, q), _tokens_first(ds.transpose(2, 3) @ w.q, k), _tokens_first(dv, v))


def _tokens_first(grad: Tensor, like: Tensor) -> Tensor:
    """[B,H,J,D] -> [B,J,G,D] like the input: the heads of a group add up."""
    b, j, g, d = like.shape
    return grad.view(b, g, grad.shape[1] // g, j, d).sum(2).transpose(1, 2).to(like.dtype).contiguous()


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Union of disjoint intervals: outs [N,...,H,D] and lses [N,...,H] -> out [...,H,D], lse [...,H]; all empty -> 0, -inf."""
    wide = torch.promote_types(outs.dtype, torch.float32)
    lses = lses.to(wide)
    top = lses.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    e = (lses - top).exp()
    total = e.sum(0)
    empty = total == 0
    weights = e / torch.where(empty, 1, total)
    out = (weights.unsqueeze(-1) * outs.to(wide)).sum(0)
    return out.to(outs.dtype), torch.where(empty, -torch.inf, top + torch.where(empty, 1, total).log())
