"""Interval attention backward: dQ by query tiles, dK and dV by key tiles. No atomics, every sum in a fixed order.

Scores are in the base of forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.primitives import _tiles
from mmkernels.primitives.interval_attention.triton.forward import (
    dropout_state,
    hull,
    interval,
    kept,
    next_run,
    power,
    scores,
    share_of,
    unit,
)  # fmt: skip

GROUP = tl.constexpr(64)  # query tiles in a group: a set of them is one uint64


@triton.jit
def backward_q(
    dout, dlse, q, k, v, out, lse, lo, hi, uniform, slopes, seed, dq, norm, delta, gain,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_j, k_g, v_b, v_j, v_g,
    Tq, Tk, H, R, rows_all, scale, scale2, rescale, threshold,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k with ds = p (dp - delta), over the same tiles as forward. Leaves what `backward_kv` needs of every row,
    [B, G, rows padded to tiles]: norm = lse in the scores' base, 0 where nothing is seen, and delta = <dout, out> - dlse,
    infinite where the row gives q and k no gradient. For float32 also gain = 1 / sum p, which undoes the rounding of lse."""
    # Who am I: as in forward.
    tiles = tl.cdiv(Tq * R, M)
    pid, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row = (tiles - 1 - pid % tiles) * M
    b, g = pid // tiles // (H // R), pid // tiles % (H // R)
    r = first_row + tl.arange(0, M)
    t, h = r // R, g * R + r % R
    inside = t < Tq
    wide_b, wide_g, wide_t, wide_h = b.to(tl.int64), g.to(tl.int64), t.to(tl.int64), h.to(tl.int64)

    # Load once. A uniform row gives q no gradient, so here it is an empty one.
    queries = _tiles.load(q + wide_b * q_b, wide_t * q_t + wide_h * q_h, inside, D, PARTS)
    grads = _tiles.load(dout + wide_b * do_b, wide_t * do_t + wide_h * do_h, inside, D, PARTS)
    low, high, start, limit, core0, core1, whole = hull(lo, hi, uniform, b, r, R, Tq, Tk)
    row, at_lse = (wide_b * Tq + t) * H + h, (wide_b * H + h) * Tq + t
    shift = _tiles.row_sums(grads, _tiles.load(out, row * D, inside, D, PARTS))
    if dlse is not None:
        shift -= tl.load(dlse + at_lse, mask=inside, other=0.0)
    base = tl.load(lse + at_lse, mask=inside, other=0.0) * unit(NATURAL)
    base = tl.where(base == float("-inf"), 0.0, base)
    if dlse is None:  # with one key p is 1 and has no gradient, which rounding must not deny
        alone = high - low == 1
        high, base = tl.where(alone, low, high), tl.where(alone, 0.0, base)
    at_row = (wide_b * (H // R) + g) * tiles * M + r
    tl.store(delta + at_row, tl.where(high > low, shift, float("inf")), mask=r * 0 == split)
    tl.store(norm + at_row, base, mask=r * 0 == split)
    slope, drop = None, None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=inside, other=0.0).to(tl.float32) * unit(NATURAL)
    if seed is not None:
        drop = dropout_state(seed, row)
    if SPLITS > 1:
        start, limit = share_of(start, limit, split, N, SPLITS)
        core1 = tl.minimum(core1, limit)

    # Loop over the runs of keys that rows see.
    k, v = k + wide_b * k_b + wide_g * k_g, v + wide_b * v_b + wide_g * v_g
    acc, total = _tiles.zeros(M, PARTS), tl.zeros([M], tl.float32)
    while start < limit:
        start, stop = next_run(low, high, start, limit, whole)
        for k0 in range(start, stop, N):
            j = k0 + tl.arange(0, N)
            keys = _tiles.load(k, j.to(tl.int64) * k_j, j < stop, D, PARTS)
            values = _tiles.load(v, j.to(tl.int64) * v_j, j < stop, D, PARTS)
            inner = (k0 >= core0) & (k0 + N <= core1)
            s = scores(queries, keys, j, stop, low, high, None, slope, scale2, inner, PRECISION)
            p = power(s - base[:, None], NATURAL)
            if gain is not None:
                total += tl.sum(p, 1)
            dp = _tiles.inner(grads, values, PRECISION)
            if drop is not None:
                dp = tl.where(kept(drop[:, None], j[None, :], threshold), dp * rescale, 0.0)
            acc = _tiles.add_product(acc, p * (dp - shift[:, None]), keys, PRECISION)
        start = stop

    # Write.
    factor = tl.full([M], scale, tl.float32)
    if gain is not None:
        inverse = 1.0 / tl.where(high > low, total, 1.0)
        factor *= inverse
        tl.store(gain + at_row, inverse)
    acc = _tiles.where(high > low, _tiles.scaled(acc, factor))
    _tiles.store(dq, (split.to(tl.int64) * rows_all + row) * D, inside, acc, D, PARTS)


@triton.jit
def hulls(lo, hi, uniform, tile_hulls, tile_sets, group_hulls, B, Tq, Tk, R, tiles, groups, M: tl.constexpr):
    """What the walk over query tiles needs to know of each, and of each GROUP of them.

    tile_hulls int32 [4, B, tiles]: the hull of the rows' intervals (start, stop), the core inside all of them (start, stop);
    tile_sets int64 [2, B, tiles]: the rows that see a key, and those of them that are not uniform; group_hulls [2, B, groups].
    """
    b, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    i = group * GROUP + tl.arange(0, GROUP)
    m = tl.arange(0, M)[None, :]
    t = (i[:, None] * M + m) // R  # [GROUP, M]
    low, high = interval(lo, hi, None, b, t, t < Tq, Tq, Tk)
    some = high > low
    learns = some
    if uniform is not None:
        learns = some & (tl.load(uniform + b.to(tl.int64) * Tq + t, mask=t < Tq, other=0) == 0)
    start, stop = tl.min(tl.where(some, low, Tk), 1), tl.max(tl.where(some, high, 0), 1)
    core1 = tl.min(
        tl.where(some, tl.where(learns, high, 0), Tk), 1
    )  # 0, so never met from inside, with a uniform row
    at, step = tile_hulls + b.to(tl.int64) * tiles + i, B * tiles
    tl.store(at, start, mask=i < tiles)
    tl.store(at + step, stop, mask=i < tiles)
    tl.store(at + 2 * step, tl.max(tl.where(some, low, 0), 1), mask=i < tiles)
    tl.store(at + 3 * step, core1, mask=i < tiles)
    sets = tile_sets + b.to(tl.int64) * tiles + i
    tl.store(sets, tl.sum(some.to(tl.int64) << m.to(tl.int64), 1), mask=i < tiles)
    tl.store(sets + step, tl.sum(learns.to(tl.int64) << m.to(tl.int64), 1), mask=i < tiles)
    tl.store(group_hulls + tl.program_id(0), tl.min(start, 0))
    tl.store(group_hulls + B * groups + tl.program_id(0), tl.max(stop, 0))


@triton.jit
def meeting(hulls, plane, first, n, k0, k1, split, SPLITS: tl.constexpr):
    """Of the GROUP hulls from `first` on, the set that meet the keys [k0, k1) and fall to this split."""
    i = first + tl.arange(0, GROUP)
    start = tl.load(hulls + i, mask=i < n, other=k1)
    stop = tl.load(hulls + plane + i, mask=i < n, other=k0)
    return _tiles.members((start < k1) & (stop > k0) & (i % SPLITS == split))


@triton.jit
def weights(s, norm, shift, j, lo, hi, at, ok, inner, Tk, NATURAL: tl.constexpr):
    """p [keys, rows] from scores. In a tile that is not inside all rows: 0 where a row does not see a key, and rows whose
    scores have no gradient score 0, which is what `norm` stands for."""
    if not inner:
        low = tl.maximum(tl.load(lo + at, mask=ok, other=0), 0)
        high = tl.minimum(tl.load(hi + at, mask=ok, other=0), Tk)
        s = tl.where((shift == float("inf"))[None, :], 0.0, s)
        s = tl.where((j[:, None] >= low[None, :]) & (j[:, None] < high[None, :]), s, float("-inf"))
    return power(s - norm[None, :], NATURAL)


@triton.jit
def backward_kv(
    dout, q, k, v, norm, delta, gain, lo, hi, uniform, slopes, seed, tile_hulls, tile_sets, group_hulls, dk, dv,
    do_b, do_t, do_h, q_b, q_t, q_h, k_b, k_j, k_g, v_b, v_j, v_g,
    B, Tq, Tk, H, R, tiles, groups, padded, keys_all, scale, scale2, rescale, threshold,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """dv = p^T dout, dk = scale ds^T q for the keys of one tile, from the query tiles whose hulls meet it."""
    # Who am I: split s of a key tile takes every SPLITS-th query tile, so a run of them is shared evenly.
    pid, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    key_tiles = tl.cdiv(Tk, N)
    k0, bg = pid % key_tiles * N, pid // key_tiles
    b, g = bg // (H // R), bg % (H // R)
    k1 = tl.minimum(k0 + N, Tk)
    j = k0 + tl.arange(0, N)
    wide_b, wide_g, wide_j = b.to(tl.int64), g.to(tl.int64), j.to(tl.int64)

    # Load once.
    keys = _tiles.load(k + wide_b * k_b + wide_g * k_g, wide_j * k_j, j < Tk, D, PARTS)
    values = _tiles.load(v + wide_b * v_b + wide_g * v_g, wide_j * v_j, j < Tk, D, PARTS)
    q, dout, row_b = q + wide_b * q_b, dout + wide_b * do_b, wide_b * Tq
    tile_hulls, tile_sets, group_hulls = (
        tile_hulls + wide_b * tiles,
        tile_sets + wide_b * tiles,
        group_hulls + wide_b * groups,
    )
    step = B * tiles
    first_row = bg.to(tl.int64) * padded

    # Loop over the query tiles that meet these keys, group by group.
    acc_k, acc_v = _tiles.zeros(N, PARTS), _tiles.zeros(N, PARTS)
    for block in range(0, groups, GROUP):
        found = meeting(group_hulls, B * groups, block, groups, k0, k1, 0, 1)
        while found != 0:
            first = (block + _tiles.lowest(found)) * GROUP
            found = found & (found - 1)
            met = meeting(tile_hulls, step, first, tiles, k0, k1, split, SPLITS)
            for _ in range(_tiles.size(met)):
                i = first + _tiles.lowest(met)
                met = met & (met - 1)
                inner = (k0 >= tl.load(tile_hulls + i + 2 * step)) & (
                    k0 + N <= tl.load(tile_hulls + i + 3 * step)
                )
                some, learning = tl.load(tile_sets + i), tl.load(tile_sets + i + step)

                # Rows that see nothing, and queries that learn nothing, are zeros whatever they hold.
                r = i * M + tl.arange(0, M)
                t, h = r // R, g * R + r % R
                learns, sees = _tiles.contains(learning, M), _tiles.contains(some, M)
                queries = _tiles.load(q, t.to(tl.int64) * q_t + h.to(tl.int64) * q_h, learns, D, PARTS)
                grads = _tiles.load(dout, t.to(tl.int64) * do_t + h.to(tl.int64) * do_h, sees, D, PARTS)
                lane = first_row + i * M + tl.arange(0, M)

                s = _tiles.inner(keys, queries, PRECISION) * scale2  # [keys, rows]
                if slopes is not None:
                    last = tl.minimum(tl.load(hi + row_b + t, mask=t < Tq, other=0), Tk) - 1
                    slope = tl.load(slopes + h, mask=t < Tq, other=0.0).to(tl.float32) * unit(NATURAL)
                    s += slope[None, :] * (j[:, None] - last[None, :]).to(tl.float32)
                base, shift = tl.load(norm + lane), tl.load(delta + lane)
                p = weights(s, base, shift, j, lo, hi, row_b + t, t < Tq, inner, Tk, NATURAL)
                if gain is not None:
                    p *= tl.load(gain + lane)[None, :]
                dp = _tiles.inner(values, grads, PRECISION)
                dropped = p
                if seed is not None:
                    keep = kept(dropout_state(seed, (row_b + t) * H + h)[None, :], j[:, None], threshold)
                    dp, dropped = tl.where(keep, dp * rescale, 0.0), tl.where(keep, p * rescale, 0.0)
                acc_v = _tiles.add_product(acc_v, dropped, grads, PRECISION)
                # An unseen value may be NaN, and a row without gradient anything.
                silent = (p == 0.0) | (shift == float("inf"))[None, :]
                ds = tl.where(silent, 0.0, p * (dp - shift[None, :]))
                acc_k = _tiles.add_product(acc_k, ds, queries, PRECISION)

    # Write.
    at = (split.to(tl.int64) * keys_all + (wide_b * Tk + j) * (H // R) + g) * D
    _tiles.store(dk, at, j < Tk, _tiles.scaled(acc_k, tl.full([N], scale, tl.float32)), D, PARTS)
    _tiles.store(dv, at, j < Tk, acc_v, D, PARTS)


@triton.jit
def add_splits(part, total, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """total[i] = part[0, i] + part[1, i] + ..., in this order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(part + i, mask=i < n)
    for _ in range(1, SPLITS):
        part += n
        acc += tl.load(part + i, mask=i < n)
    tl.store(total + i, acc.to(total.dtype.element_ty), mask=i < n)
