"""Rows of a block counted by group, and sent to their places."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count(groups, found, R, E, EP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """found[block, e] = the block's rows of group e."""
    block = tl.program_id(0)
    r = block * ROWS + tl.arange(0, ROWS)
    ids = tl.load(groups + r, mask=r < R, other=-1)
    for e0 in range(0, EP, GROUPS):
        e = e0 + tl.arange(0, GROUPS)
        own = (ids[:, None] == e[None, :]).to(tl.int32)
        tl.store(found + block.to(tl.int64) * E + e, tl.sum(own, 0), mask=e < E)


@triton.jit
def place(groups, first, order, inverse, R, E, EP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """first[block, e]: the place of the block's first row of group e."""
    block = tl.program_id(0)
    r = block * ROWS + tl.arange(0, ROWS)
    ids = tl.load(groups + r, mask=r < R, other=-1)
    to = tl.full([ROWS], -1, tl.int32)
    for e0 in range(0, EP, GROUPS):
        e = e0 + tl.arange(0, GROUPS)
        own = (ids[:, None] == e[None, :]) & (e < E)[None, :]
        ones = own.to(tl.int32)
        start = tl.load(first + block.to(tl.int64) * E + e, mask=e < E, other=0)
        rank = tl.sum(tl.where(own, tl.cumsum(ones, 0) - 1 + start[None, :], 0), 1)
        to = tl.where(tl.sum(ones, 1) > 0, rank, to)
    tl.store(inverse + r, to, mask=r < R)
    tl.store(order + to, r, mask=(r < R) & (to >= 0))
