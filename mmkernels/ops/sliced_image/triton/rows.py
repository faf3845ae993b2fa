"""Rows that are updated by their window, and rows that are copied from where they stand."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(order, tile_group, tile_row, offsets, tile, M: tl.constexpr):
    """The tile's window (-1: no such tile) and its rows, and which of them are there."""
    w = tl.load(tile_group + tile)
    i = tl.load(tile_row + tile) + tl.arange(0, M)
    ok = (i < tl.load(offsets + tl.maximum(w, 0) + 1)) & (w >= 0)
    return w, tl.load(order + i, mask=ok, other=0).to(tl.int64), ok


@triton.jit
def down(
    x, a, order, tile_group, tile_row, offsets, t, x_r, a_w, a_k, a_c, W, K, C,
    KP: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t[r, k] = sum_c x[r, c] a[window of r, k, c]; rows of no window (W) get 0."""
    w, r, ok = rows_of(order, tile_group, tile_row, offsets, tl.program_id(0), M)
    if w < 0:
        return
    k, acc = tl.arange(0, KP), tl.zeros([M, KP], tl.float32)
    if w < W:
        a += w.to(tl.int64) * a_w
        for c0 in range(0, C, CB):
            c = c0 + tl.arange(0, CB)
            left = tl.load(
                x + (r * x_r)[:, None] + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0
            )
            at = (c.to(tl.int64) * a_c)[:, None] + (k.to(tl.int64) * a_k)[None, :]
            right = tl.load(a + at, mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(t + (r * K)[:, None] + k[None, :], acc, mask=ok[:, None] & (k < K)[None, :])


@triton.jit
def up(
    t, b, base, order, tile_group, tile_row, offsets, out, b_w, b_n, b_k, base_r, W, K, N,
    KP: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[r, n] = base[r, n] + sum_k t[r, k] b[window of r, n, k]; base None: 0."""
    blocks = tl.cdiv(N, NB)
    w, r, ok = rows_of(order, tile_group, tile_row, offsets, tl.program_id(0) // blocks, M)
    if w < 0:
        return
    n, k = tl.program_id(0) % blocks * NB + tl.arange(0, NB), tl.arange(0, KP)
    mask, acc = ok[:, None] & (n < N)[None, :], tl.zeros([M, NB], tl.float32)
    if base is not None:
        acc = tl.load(base + (r * base_r)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if w < W:
        left = tl.load(t + (r * K)[:, None] + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0)
        at = (k.to(tl.int64) * b_k)[:, None] + (n.to(tl.int64) * b_n)[None, :]
        right = tl.load(b + w.to(tl.int64) * b_w + at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc += tl.dot(left, right.to(tl.float32), input_precision=PRECISION)
    tl.store(out + (r * N)[:, None] + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def outer(
    t, y, order, offsets, grad, y_r, g_w, g_k, g_n, K, N,
    KP: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad[w, k, n] = sum of t[r, k] y[r, n] over the rows of window w, in order."""
    blocks = tl.cdiv(N, NB)
    w, n, k = tl.program_id(0) // blocks, tl.program_id(0) % blocks * NB + tl.arange(0, NB), tl.arange(0, KP)
    stop, acc = tl.load(offsets + w + 1), tl.zeros([KP, NB], tl.float32)
    for i0 in range(tl.load(offsets + w), stop, M):
        i = i0 + tl.arange(0, M)
        r = tl.load(order + i, mask=i < stop, other=0).to(tl.int64)
        left = tl.load(
            t + (r * K)[None, :] + k[:, None], mask=(i < stop)[None, :] & (k < K)[:, None], other=0.0
        )
        at = (r * y_r)[:, None] + n[None, :]
        right = tl.load(y + at, mask=(i < stop)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(left, right.to(tl.float32), acc, input_precision=PRECISION)
    at = w.to(tl.int64) * g_w + (k.to(tl.int64) * g_k)[:, None] + (n.to(tl.int64) * g_n)[None, :]
    tl.store(grad + at, acc.to(grad.dtype.element_ty), mask=(k < K)[:, None] & (n < N)[None, :])


@triton.jit
def copy_rows(tokens, visual, special, index, out, t_r, v_r, s_r, V, E, C, CB: tl.constexpr):
    """A program owns a row of the output."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.load(index + row).to(tl.int64)
    for c0 in range(0, C, CB):
        c = c0 + tl.arange(0, CB)
        if (i >= 0) & (i < V):
            value = tl.load(visual + i * v_r + c, mask=c < C).to(out.dtype.element_ty)
        elif (i <= -2) & (i >= -1 - E):
            value = tl.load(special + (-2 - i) * s_r + c, mask=c < C).to(out.dtype.element_ty)
        else:
            value = tl.load(tokens + row * t_r + c, mask=c < C)
        tl.store(out + row * C + c, value, mask=c < C)


@triton.jit
def gather_rows(dout, order, start, grad, d_r, C, CB: tl.constexpr):
    """A program owns a row of the gradient: the rows order[start[i]] .. order[start[i + 1] - 1] of dout, added in order."""
    row = tl.program_id(0)
    first, last = tl.load(start + row), tl.load(start + row + 1)
    for c0 in range(0, C, CB):
        c = c0 + tl.arange(0, CB)
        acc = tl.zeros([CB], tl.float32)
        for n in range(first, last):
            at = tl.load(order + n).to(tl.int64) * d_r
            acc += tl.load(dout + at + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(grad + row.to(tl.int64) * C + c, acc.to(grad.dtype.element_ty), mask=c < C)
