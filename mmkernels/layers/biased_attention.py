"""Attention with a bias for every distance: two batched products and a softmax, a bounded number of scores at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES = (
    1 << 24
)  # how many exist at once; with more, query rows go in chunks and backward computes them again


def relative_buckets(distance: Tensor, buckets: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """T5's bucket of each distance `key - query`, int64.

    Half of the buckets are for one distance each, the other half for ranges that grow as its logarithm up to `max_distance`,
    beyond which all is one. `both_ways` gives later keys buckets of their own; otherwise they share the bucket of distance 0.
    """
    if both_ways:
        buckets //= 2
        first, steps = (distance > 0).long() * buckets, distance.abs()
    else:
        first, steps = torch.zeros_like(distance, dtype=torch.int64), (-distance).clamp(min=0)
    exact = buckets // 2
    # float32 and in this order: powers of two lie on the borders, where another rounding would choose another bucket
    ratio = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    ranges = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(steps < exact, steps.long(), ranges)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """`softmax(q k^T + bias) v`, unscaled; at most `SCORES` scores exist at once.

    **Shapes** q `[B H, Tq, D]`, k, v `[B H, Tk, D]`, heads varying faster; bias `[H, Tq + Tk - 1]` by distance: query i adds
    entry `j - i + Tq - 1` to key j, -inf where it must not look; mask bool `[B, Tk]`, True at keys that count. Out like q.
    **Dtypes** any floating dtype; softmax in at least float32. **Gradient** q, k, v, bias.
    **Edge** a row without a key averages all values; hidden keys and values must be finite.
    """
    rows = max(1, SCORES // max(1, k.shape[0] * k.shape[1]))
    if q.shape[1] <= rows:
        return _attend(q, k, v, heads, bias, mask)
    parts = []
    for start in range(0, q.shape[1], rows):
        part = q[:, start : start + rows]
        low = q.shape[1] - start - part.shape[1]
        near = None if bias is None else bias[:, low : low + part.shape[1] + k.shape[1] - 1]
        arguments = (part, k, v, heads, near, mask)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend(*arguments))
    return torch.cat(parts, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.unflatten(0, (-1, heads))
    if bias is not None:  # window w of the bias is the row of query Tq - 1 - w
        scores = scores + bias.unfold(-1, k.shape[1], 1).flip(1)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    return torch.bmm(scores.softmax(-1).to(v.dtype).flatten(0, 1), v)
