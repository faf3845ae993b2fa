"""Interval attention forward: the kernel that attends and the one that joins the splits of long key runs.

16-bit inputs score in base 2, one multiplication less for every key. float32 is NATURAL, in base e: rounding lse once more,
from base 2, would show in every probability of the row in backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.primitives import _tiles

LOG2E = 1.4426950408889634


@triton.constexpr_function
def unit(natural):
    """What a score in base e is multiplied by."""
    return 1.0 if natural else LOG2E


@triton.jit
def power(x, NATURAL: tl.constexpr):
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def interval(lo, hi, mute, b, t, ok, Tq, Tk):
    """The clamped interval of rows t; a row that is not ok, or is marked in `mute`, is empty."""
    at = b.to(tl.int64) * Tq + t
    low = tl.minimum(tl.maximum(tl.load(lo + at, mask=ok, other=0), 0), Tk)
    high = tl.maximum(low, tl.minimum(tl.load(hi + at, mask=ok, other=0), Tk))
    if mute is not None:
        high = tl.where(tl.load(mute + at, mask=ok, other=0) != 0, low, high)
    return low, high


@triton.jit
def hull(lo, hi, mute, b, r, R, Tq, Tk):
    """Of a tile's rows: their intervals, the hull [start, stop) of all, the core [first, last) inside every one, and whether
    the hull has no hole for sure: each interval then touches that of the token before it."""
    t = r // R
    low, high = interval(lo, hi, mute, b, t, t < Tq, Tq, Tk)
    before = tl.maximum(r - 1, tl.min(r, 0)) // R
    low0, high0 = interval(lo, hi, mute, b, before, t < Tq, Tq, Tk)
    apart = (tl.maximum(low, low0) > tl.minimum(high, high0)) & (t < Tq)
    some = high > low
    start, stop = tl.min(tl.where(some, low, Tk), 0), tl.max(tl.where(some, high, 0), 0)
    first, last = tl.max(tl.where(some, low, 0), 0), tl.min(tl.where(some, high, Tk), 0)
    return low, high, start, stop, first, last, tl.max(apart.to(tl.int32), 0) == 0


@triton.jit
def dropout_state(seed, row):
    """The hash of (seed, row), row counting (batch row, token, head)."""
    s = tl.load(seed)
    folded = s.to(tl.uint32) ^ _tiles.mix((s >> 32).to(tl.uint32))
    return _tiles.mix(row.to(tl.uint32) ^ _tiles.mix(folded))


@triton.jit
def kept(state, j, threshold):
    return _tiles.mix(state ^ j.to(tl.uint32)) >= threshold.to(tl.uint32)


@triton.jit
def share_of(start, limit, split, N: tl.constexpr, SPLITS: tl.constexpr):
    """The split-th of SPLITS equal shares of a tile's own hull, in whole key tiles."""
    share = tl.cdiv(tl.cdiv(tl.maximum(limit - start, 0), N), SPLITS) * N
    return start + split * share, tl.minimum(limit, start + (split + 1) * share)


@triton.jit
def next_run(low, high, cursor, limit, whole):
    """The first run [start, stop) of keys between cursor and limit that all are seen by some row of the tile."""
    some = (high > low) & (high > cursor)
    start = tl.maximum(tl.min(tl.where(some, low, limit), 0), cursor)
    stop = limit
    if not whole:
        stop = start
        grown = tl.max(tl.where(some & (low <= start), high, start), 0)
        while grown > stop:
            stop = grown
            grown = tl.max(tl.where(some & (low <= stop), high, stop), 0)
        stop = tl.minimum(stop, limit)
    return start, stop


@triton.jit
def scores(q, k, j, stop, low, high, flat, slope, scale, inside, PRECISION: tl.constexpr):
    """Scores [rows, keys]: -inf where a row does not see, 0 where it is uniform, unless the tile is inside all rows."""
    s = _tiles.inner(q, k, PRECISION) * scale
    if slope is not None:
        s += slope[:, None] * (j[None, :] - (high[:, None] - 1)).to(tl.float32)
    if not inside:
        if flat is not None:
            s = tl.where(flat[:, None], 0.0, s)
        length = tl.maximum(
            tl.minimum(high, stop) - low, 0
        )  # keys from `stop` on belong to another run or split
        sees = (j[None, :] - low[:, None]).to(tl.uint32) < length.to(tl.uint32)[
            :, None
        ]  # low <= j < low + length
        s = tl.where(sees, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=("threshold",))
def forward(
    q, k, v, lo, hi, uniform, slopes, seed, out, lse,
    q_b, q_t, q_h, k_b, k_j, k_g, v_b, v_j, v_g,
    Tq, Tk, H, R, rows_all, scale, rescale, threshold,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """Rows of a tile are (token r // R, head r % R of key head g); R = H / G heads share the keys they read."""
    # Who am I: neighbours in the grid share keys; later tiles first, for causal rows they are the longest.
    tiles = tl.cdiv(Tq * R, M)
    pid, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row = (tiles - 1 - pid % tiles) * M
    b, g = pid // tiles // (H // R), pid // tiles % (H // R)
    r = first_row + tl.arange(0, M)
    t, h = r // R, g * R + r % R
    inside = t < Tq
    wide_b, wide_g = b.to(tl.int64), g.to(tl.int64)

    # Load once: the queries, their intervals, what they need for bias and dropout.
    queries = _tiles.load(q + wide_b * q_b, t.to(tl.int64) * q_t + h.to(tl.int64) * q_h, inside, D, PARTS)
    low, high, start, limit, core0, core1, whole = hull(lo, hi, None, b, r, R, Tq, Tk)
    row = (wide_b * Tq + t) * H + h  # (batch row, token, head)
    flat, slope, drop = None, None, None
    if uniform is not None:
        flat = tl.load(uniform + wide_b * Tq + t, mask=inside, other=0) != 0
        core1 = tl.where(tl.max(flat.to(tl.int32), 0) > 0, 0, core1)  # a uniform row makes every tile partial
    if slopes is not None:
        slope = tl.load(slopes + h, mask=inside, other=0.0).to(tl.float32) * unit(NATURAL)
    if seed is not None:
        drop = dropout_state(seed, row)
    if SPLITS > 1:
        start, limit = share_of(start, limit, split, N, SPLITS)
        core1 = tl.minimum(core1, limit)

    # Loop: online softmax over the runs of keys that rows see; only a tile that is not inside every row's interval is masked.
    k, v = k + wide_b * k_b + wide_g * k_g, v + wide_b * v_b + wide_g * v_g
    top, total, acc = (
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M], tl.float32),
        _tiles.zeros(M, PARTS),
    )
    while start < limit:
        start, stop = next_run(low, high, start, limit, whole)
        for k0 in range(start, stop, N):
            j = k0 + tl.arange(0, N)
            keys = _tiles.load(k, j.to(tl.int64) * k_j, j < stop, D, PARTS)
            inner = (k0 >= core0) & (k0 + N <= core1)
            s = scores(queries, keys, j, stop, low, high, flat, slope, scale, inner, PRECISION)
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            p, fade = power(s - base[:, None], NATURAL), power(top - base, NATURAL)
            top, total = new, total * fade + tl.sum(p, 1)
            if drop is not None:
                p = tl.where(kept(drop[:, None], j[None, :], threshold), p, 0.0)
            values = _tiles.load(v, j.to(tl.int64) * v_j, j < stop, D, PARTS)
            acc = _tiles.add_product(_tiles.scaled(acc, fade), p, values, PRECISION)
        start = stop

    # Write.
    seen = (high > low) & (total != 0)
    total = tl.where(seen, total, 1.0)
    past = split.to(tl.int64) * rows_all
    acc = _tiles.where(seen, _tiles.scaled(acc, rescale / total))
    _tiles.store(out, (past + row) * D, inside, acc, D, PARTS)
    at_lse = past + (wide_b * H + h) * Tq + t
    tl.store(lse + at_lse, tl.where(seen, top / unit(NATURAL) + tl.log(total), float("-inf")), mask=inside)


@triton.jit
def combine(
    part, part_lse, out, lse, Tq, H, rows_all,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of a row in their order: out = sum_s exp(lse_s - lse) out_s."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    inside = row < rows_all
    at_lse = (row // (Tq * H) * H + row % H) * Tq + row // H % Tq
    top, total, acc = (
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M], tl.float32),
        _tiles.zeros(M, PARTS),
    )
    for s in range(SPLITS):
        here = tl.load(part_lse + s * rows_all + at_lse, mask=inside, other=float("-inf"))
        new = tl.maximum(top, here)
        base = tl.where(new == float("-inf"), 0.0, new)
        fade, weight = tl.exp(top - base), tl.exp(here - base)
        piece = _tiles.load(part, (s * rows_all + row) * D, inside & (here != float("-inf")), D, PARTS)
        acc = _tiles.summed(_tiles.scaled(acc, fade), _tiles.scaled(piece, weight))
        top, total = new, total * fade + weight
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    _tiles.store(out, row * D, inside, _tiles.scaled(acc, 1.0 / total), D, PARTS)
    tl.store(lse + at_lse, tl.where(seen, top + tl.log(total), float("-inf")), mask=inside)
