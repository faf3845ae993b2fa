"""Heads that turn to their row's position."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(
    v, out, cos, sin, v_r, out_r, turned, half, heads,
    HB: tl.constexpr, WB: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """out = v with its first `turned` of `heads` heads turned, or turned BACK; the others are copied unless out is v."""
    # Who am I: a row.
    row = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, WB)
    ok = w < half
    c = tl.load(cos + row * half + w, mask=ok, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + w, mask=ok, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s

    # Loop over heads: load, turn, write.
    for h0 in range(0, heads, HB):
        h = h0 + tl.arange(0, HB)
        at = (h * 2 * half)[:, None] + w[None, :]
        inside = (h < heads)[:, None] & ok[None, :]
        a = tl.load(v + row * v_r + at, mask=inside, other=0.0)
        b = tl.load(v + row * v_r + at + half, mask=inside, other=0.0)
        mine = (h < turned)[:, None]
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        first = tl.where(mine, wide_a * c - wide_b * s, wide_a)
        second = tl.where(mine, wide_b * c + wide_a * s, wide_b)
        tl.store(out + row * out_r + at, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + row * out_r + at + half, second.to(out.dtype.element_ty), mask=inside)
