"""Attention inside packed slices: forward, and backward for queries and for keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.primitives import _tiles


@triton.jit
def slice_of(offsets, tile_slice, tile_row, tile):
    """The tile's slice (-1: no such tile), the slice's first row and end, the tile's first row."""
    s = tl.load(tile_slice + tile)
    at = tl.maximum(s, 0)
    return s, tl.load(offsets + at), tl.load(offsets + at + 1), tl.load(tile_row + tile)


@triton.jit
def slice_forward(
    q, k, v, offsets, tile_slice, tile_row, out, lse,
    q_t, q_h, k_t, k_g, v_t, v_g, T, H, R, scale,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Who am I: neighbours in the grid are heads of the same rows.
    tile, h = tl.program_id(0) // H, tl.program_id(0) % H
    s, start, stop, first = slice_of(offsets, tile_slice, tile_row, tile)
    if s < 0:
        return
    t = first + tl.arange(0, M)
    inside, wide_h, wide_g = t < stop, h.to(tl.int64), (h // R).to(tl.int64)

    # Load once.
    queries = _tiles.load(q + wide_h * q_h, t.to(tl.int64) * q_t, inside, D, PARTS)
    k, v = k + wide_g * k_g, v + wide_g * v_g
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = _tiles.zeros(M, PARTS)

    # Loop over the slice's keys, from its own first one.
    for k0 in range(start, stop, N):
        j = k0 + tl.arange(0, N)
        keys = _tiles.load(k, j.to(tl.int64) * k_t, j < stop, D, PARTS)
        x = _tiles.inner(queries, keys, PRECISION) * scale
        x = tl.where((j < stop)[None, :], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        p, fade = tl.exp(x - new[:, None]), tl.exp(top - new)
        top, total = new, total * fade + tl.sum(p, 1)
        values = _tiles.load(v, j.to(tl.int64) * v_t, j < stop, D, PARTS)
        acc = _tiles.add_product(_tiles.scaled(acc, fade), p, values, PRECISION)

    # Write.
    row = t.to(tl.int64) * H + h
    _tiles.store(out, row * D, inside, _tiles.scaled(acc, 1.0 / total), D, PARTS)
    tl.store(lse + wide_h * T + t, top + tl.log(total), mask=inside)


@triton.jit
def slice_backward_q(
    dout, q, k, v, out, lse, offsets, tile_slice, tile_row, dq, delta,
    d_t, d_h, q_t, q_h, k_t, k_g, v_t, v_g, T, H, R, scale,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_j p (dp - delta) k, with delta = <dout, out>, which is left for `slice_backward_kv`."""
    tile, h = tl.program_id(0) // H, tl.program_id(0) % H
    s, start, stop, first = slice_of(offsets, tile_slice, tile_row, tile)
    if s < 0:
        return
    t = first + tl.arange(0, M)
    inside, wide_h, wide_g = t < stop, h.to(tl.int64), (h // R).to(tl.int64)
    row = t.to(tl.int64) * H + h
    queries = _tiles.load(q + wide_h * q_h, t.to(tl.int64) * q_t, inside, D, PARTS)
    above = _tiles.load(dout + wide_h * d_h, t.to(tl.int64) * d_t, inside, D, PARTS)
    own = _tiles.row_sums(above, _tiles.load(out, row * D, inside, D, PARTS))
    norm = tl.load(lse + wide_h * T + t, mask=inside, other=0.0)
    tl.store(delta + wide_h * T + t, own, mask=inside)
    k, v, acc = k + wide_g * k_g, v + wide_g * v_g, _tiles.zeros(M, PARTS)
    for k0 in range(start, stop, N):
        j = k0 + tl.arange(0, N)
        keys = _tiles.load(k, j.to(tl.int64) * k_t, j < stop, D, PARTS)
        values = _tiles.load(v, j.to(tl.int64) * v_t, j < stop, D, PARTS)
        p = tl.exp(_tiles.inner(queries, keys, PRECISION) * scale - norm[:, None])
        p = tl.where((j < stop)[None, :], p, 0.0)
        ds = p * (_tiles.inner(above, values, PRECISION) - own[:, None]) * scale
        acc = _tiles.add_product(acc, ds, keys, PRECISION)
    _tiles.store(dq, row * D, inside, acc, D, PARTS)


@triton.jit
def slice_backward_kv(
    dout, q, k, v, lse, delta, offsets, tile_slice, tile_row, dk, dv,
    d_t, d_h, q_t, q_h, k_t, k_g, v_t, v_g, T, H, R, scale,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale sum_t p (dp - delta) q, dv = sum_t p dout, over the slice's rows and the heads that share the key head."""
    G = H // R
    tile, g = tl.program_id(0) // G, tl.program_id(0) % G
    s, start, stop, first = slice_of(offsets, tile_slice, tile_row, tile)
    if s < 0:
        return
    j = first + tl.arange(0, N)
    inside, wide_g = j < stop, g.to(tl.int64)
    keys = _tiles.load(k + wide_g * k_g, j.to(tl.int64) * k_t, inside, D, PARTS)
    values = _tiles.load(v + wide_g * v_g, j.to(tl.int64) * v_t, inside, D, PARTS)
    sum_k, sum_v = _tiles.zeros(N, PARTS), _tiles.zeros(N, PARTS)
    for r in range(R):
        h = wide_g * R + r
        for t0 in range(start, stop, M):
            t = t0 + tl.arange(0, M)
            ok = t < stop
            queries = _tiles.load(q + h * q_h, t.to(tl.int64) * q_t, ok, D, PARTS)
            above = _tiles.load(dout + h * d_h, t.to(tl.int64) * d_t, ok, D, PARTS)
            norm = tl.load(lse + h * T + t, mask=ok, other=0.0)
            own = tl.load(delta + h * T + t, mask=ok, other=0.0)
            p = tl.exp(_tiles.inner(keys, queries, PRECISION) * scale - norm[None, :])
            p = tl.where(ok[None, :], p, 0.0)
            sum_v = _tiles.add_product(sum_v, p, above, PRECISION)
            ds = p * (_tiles.inner(values, above, PRECISION) - own[None, :]) * scale
            sum_k = _tiles.add_product(sum_k, ds, queries, PRECISION)
    at = (j.to(tl.int64) * G + g) * D
    _tiles.store(dk, at, inside, sum_k, D, PARTS)
    _tiles.store(dv, at, inside, sum_v, D, PARTS)
