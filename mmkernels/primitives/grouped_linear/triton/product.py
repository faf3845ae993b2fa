"""The product of rows with the weight of their group, its epilogue, and where rows come from and go."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_of(counts, tile, E, EP: tl.constexpr, M: tl.constexpr, rows):
    """Of the tile-th tile: its group (E when there is no such tile), its first row and the end of its group."""
    e = tl.arange(0, EP)
    count = tl.minimum(tl.maximum(tl.load(counts + e, mask=e < E, other=0), 0), rows)  # no sum overflows
    ends = tl.minimum(tl.cumsum(count, 0), rows)
    starts = tl.minimum(ends, tl.maximum(tl.cumsum(count, 0) - count, 0))
    tiles = tl.cdiv(ends - starts, M)
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    mine = e == group
    start = tl.sum(tl.where(mine, starts + (tile - last + tiles) * M, 0), 0)
    return tl.where(group < E, group, E), start, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def places(index, i, ok, size):
    """index[i], or i itself without an index, and whether it is one of `size` rows."""
    at = i
    if index is not None:
        at = tl.load(index + i, mask=ok, other=-1)
    return at.to(tl.int64), ok & (at >= 0) & (at < size)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def twice_inner(h):
    """gelu_tanh is h sigmoid of this."""
    return 1.5957691216057308 * h * (1.0 + 0.044715 * h * h)


@triton.jit
def activate(h, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return h * 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return h * sigmoid(twice_inner(h))
    if ACTIVATION == "silu":
        return h * sigmoid(h)
    if ACTIVATION == "quick_gelu":
        return h * sigmoid(1.702 * h)
    if ACTIVATION == "swiglu":
        return h * sigmoid(h) * up
    return h


@triton.jit
def multiply(
    acc, x, w, at, ok, n, N, C, w_n, w_c, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x[at] w[n]^T over all channels."""
    for c0 in range(0, C, K):
        c = c0 + tl.arange(0, K)
        a = tl.load(x + at[:, None] + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        wide_c = c.to(tl.int64) * w_c
        b = tl.load(
            w + wide_c[:, None] + (n.to(tl.int64) * w_n)[None, :],
            mask=(c < C)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_lora(
    acc, t, b, ends, S, SP: tl.constexpr, i, ok, n, N, R, b_s, b_n, b_r, RP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + t[i] b[segment of i]^T, segment after segment that meets the tile; rows past the last have none."""
    s = tl.arange(0, SP)
    end = tl.load(ends + s, mask=s < S, other=2147483647)
    r = tl.arange(0, RP)
    first = tl.sum((end <= tl.min(i, 0)).to(tl.int32), 0)
    last = tl.sum((end <= tl.max(tl.where(ok, i, 0), 0)).to(tl.int32), 0)
    for segment in range(first, tl.minimum(last + 1, S)):
        low = tl.load(ends + segment - 1, mask=segment > 0, other=0)
        own = ok & (i >= low) & (i < tl.load(ends + segment))
        rows = tl.load(
            t + i.to(tl.int64)[:, None] * R + r[None, :], mask=own[:, None] & (r < R)[None, :], other=0.0
        )
        at = (
            r.to(tl.int64) * b_r + (tl.zeros([RP], tl.int64) + segment) * b_s
        )  # a loop's counter may be a plain int
        at = b + at[:, None] + (n.to(tl.int64) * b_n)[None, :]
        factor = tl.load(at, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(rows, factor, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=("half",))
def product(
    x, w, counts, read, write, bias, scale, residual, t, b, ends, out, h,
    x_r, w_e, w_n, w_c, b_s, b_n, b_r, res_r,
    E, rows_x, rows, rows_out, N, C, S, R, half,
    EP: tl.constexpr, SP: tl.constexpr, RP: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, K: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """out[write[i]] = residual[write[i]] + scale[i] activation(x[read[i]] w[group]^T + bias[group] + t[i] b[segment]^T), N
    wide; h keeps what the activation takes. For swiglu `half` rows of w lie between gate and up."""
    # Who am I: neighbours share the weight of a group and differ in rows.
    blocks, near = tl.cdiv(N, NB), tl.program_id(0) % GROUPED
    tile, block = tl.program_id(0) // GROUPED // blocks * GROUPED + near, tl.program_id(0) // GROUPED % blocks
    group, start, stop = group_of(counts, tile, E, EP, M, rows)
    if group >= E:
        return
    i, n = start + tl.arange(0, M), block * NB + tl.arange(0, NB)
    at, ok = places(read, i, i < stop, rows_x)
    to, ok = places(write, i, ok, rows_out)

    # Loop: channels, then what LoRA adds.
    w += group.to(tl.int64) * w_e
    acc = multiply(tl.zeros([M, NB], tl.float32), x, w, at * x_r, ok, n, N, C, w_n, w_c, K, PRECISION)
    up = acc
    if ACTIVATION == "swiglu":
        far = w + half.to(tl.int64) * w_n
        up = multiply(tl.zeros([M, NB], tl.float32), x, far, at * x_r, ok, n, N, C, w_n, w_c, K, PRECISION)
    if t is not None:
        acc = add_lora(acc, t, b, ends, S, SP, i, ok, n, N, R, b_s, b_n, b_r, RP, PRECISION)
        if ACTIVATION == "swiglu":
            up = add_lora(up, t, b + half * b_n, ends, S, SP, i, ok, n, N, R, b_s, b_n, b_r, RP, PRECISION)

    # Write.
    width = N + half
    inside = ok[:, None] & (n < N)[None, :]
    if bias is not None:
        acc += tl.load(bias + group.to(tl.int64) * width + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            up += tl.load(bias + group.to(tl.int64) * width + half + n, mask=n < N, other=0.0).to(tl.float32)[
                None, :
            ]
    if h is not None:
        kept = h + i.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(kept, acc.to(h.dtype.element_ty), mask=inside)
        if ACTIVATION == "swiglu":
            tl.store(kept + half, up.to(h.dtype.element_ty), mask=inside)
    y = activate(acc, up, ACTIVATION)
    if scale is not None:
        y *= tl.load(scale + i, mask=ok, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        y += tl.load(residual + (to * res_r)[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (to * N)[:, None] + n[None, :], y.to(out.dtype.element_ty), mask=inside)
