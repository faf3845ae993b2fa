"""Backward: the epilogue's gradient, rows that were gathered added up, and dW as a product over the rows of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.primitives.grouped_linear.triton.product import activate, places, sigmoid, twice_inner


@triton.jit
def slopes(h, up, ACTIVATION: tl.constexpr):
    """d activation / dh and, for swiglu, / dup."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return cdf + h * tl.exp(-0.5 * h * h) * 0.3989422804014327, up
    if ACTIVATION == "gelu_tanh":
        s = sigmoid(twice_inner(h))
        return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h), up
    if ACTIVATION == "silu":
        s = sigmoid(h)
        return s * (1.0 + h * (1.0 - s)), up
    if ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * h)
        return s * (1.0 + 1.702 * h * (1.0 - s)), up
    if ACTIVATION == "swiglu":
        s = sigmoid(h)
        return up * s * (1.0 + h * (1.0 - s)), h * s
    return tl.full(h.shape, 1.0, tl.float32), up


@triton.jit(do_not_specialize=("half",))
def epilogue_backward(
    dout, h, scale, counts, read, write, dh, dscale, dresidual, source,
    do_r, E, rows_x, rows, rows_out, N, half,
    EP: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dh [M, N (+ half)] = scale dout[write] activation'(h), 0 in a row of no group; the gradients of scale and residual; and
    `source`, the row of x that each row reads, -1 for a row of no group."""
    e = tl.arange(0, EP)
    count = tl.minimum(tl.maximum(tl.load(counts + e, mask=e < E, other=0), 0), rows)
    used = tl.minimum(tl.sum(count, 0), rows)
    i = tl.program_id(0) * M + tl.arange(0, M)
    at, ok = places(read, i, i < used, rows_x)
    to, ok = places(write, i, ok, rows_out)
    tl.store(source + i, tl.where(ok, at, -1).to(tl.int32), mask=i < rows)
    factor = tl.full([M], 1.0, tl.float32)
    if scale is not None:
        factor = tl.load(scale + i, mask=ok, other=0.0).to(tl.float32)
    share = tl.zeros([M], tl.float32)
    width = N + half
    for n0 in range(0, N, NB):
        n = n0 + tl.arange(0, NB)
        inside = ok[:, None] & (n < N)[None, :]
        do = tl.load(dout + (to * do_r)[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if dresidual is not None:
            tl.store(
                dresidual + (to * N)[:, None] + n[None, :], do.to(dresidual.dtype.element_ty), mask=inside
            )
        place = i.to(tl.int64)[:, None] * width + n[None, :]
        gate, up = do, do
        if h is not None:
            gate = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
            up = gate
            if ACTIVATION == "swiglu":
                up = tl.load(h + place + half, mask=inside, other=0.0).to(tl.float32)
        if dscale is not None:
            share += tl.sum(do * activate(gate, up, ACTIVATION), 1)
        do = do * factor[:, None]
        first, second = slopes(gate, up, ACTIVATION)
        bounds = (i < rows)[:, None] & (n < N)[None, :]
        tl.store(dh + place, (do * first).to(dh.dtype.element_ty), mask=bounds)
        if ACTIVATION == "swiglu":
            tl.store(dh + place + half, (do * second).to(dh.dtype.element_ty), mask=bounds)
    if dscale is not None:
        tl.store(dscale + i, share.to(dscale.dtype.element_ty), mask=i < rows)


@triton.jit
def add_rows(da, order, starts, dx, C, NB: tl.constexpr):
    """dx[r] = the sum of da[order[j]] for starts[r] <= j < starts[r + 1], in that order."""
    blocks = tl.cdiv(C, NB)
    r, n = tl.program_id(0) // blocks, tl.program_id(0) % blocks * NB + tl.arange(0, NB)
    acc = tl.zeros([NB], tl.float32)
    for j in range(tl.load(starts + r).to(tl.int32), tl.load(starts + r + 1).to(tl.int32)):
        row = tl.load(order + j).to(tl.int64) * C
        acc += tl.load(da + row + n, mask=n < C, other=0.0).to(tl.float32)
    tl.store(dx + r.to(tl.int64) * C + n, acc.to(dx.dtype.element_ty), mask=n < C)


@triton.jit
def weight_backward(
    dy, x, counts, source, dw, db,
    dy_r, x_r, E, rows, N, C,
    EP: tl.constexpr, M: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr, SPLITS: tl.constexpr, GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dw[e] = sum over the rows of group e of dy[i]^T x[source[i]] (x[i] unless GATHERED); db[e] = sum of dy[i]. With splits,
    dw and db hold one part for each."""
    # Who am I: a block of one group's weight, and which of its rows are mine.
    wide, high = tl.cdiv(C, KB), tl.cdiv(N, NB)
    pid, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    k, n, group = pid % wide, pid // wide % high, pid // wide // high
    e = tl.arange(0, EP)
    count = tl.minimum(tl.maximum(tl.load(counts + e, mask=e < E, other=0), 0), rows)
    stop = tl.minimum(tl.sum(tl.where(e <= group, count, 0), 0), rows)
    start = tl.minimum(tl.sum(tl.where(e < group, count, 0), 0), rows)
    share = tl.cdiv(tl.cdiv(stop - start, M), SPLITS) * M
    first = start + split * share
    stop = tl.minimum(stop, first + share)
    c, n = k * KB + tl.arange(0, KB), n * NB + tl.arange(0, NB)

    # Loop over rows.
    acc, total = tl.zeros([NB, KB], tl.float32), tl.zeros([NB], tl.float32)
    for i0 in range(first, stop, M):
        i = i0 + tl.arange(0, M)
        at = tl.load(source + i, mask=i < stop, other=-1).to(tl.int64)
        ok = at >= 0
        if not GATHERED:
            at = i.to(tl.int64)
        grad = dy + (i.to(tl.int64) * dy_r)[None, :] + n[:, None]
        g = tl.load(grad, mask=ok[None, :] & (n < N)[:, None], other=0.0)
        a = tl.load(x + (at * x_r)[:, None] + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
        if db is not None:
            total += tl.sum(g.to(tl.float32), 1)

    # Write.
    row = (split.to(tl.int64) * E + group) * N + n
    inside = (n < N)[:, None] & (c < C)[None, :]
    tl.store(dw + row[:, None] * C + c[None, :], acc.to(dw.dtype.element_ty), mask=inside)
    if db is not None:
        tl.store(db + row, total.to(db.dtype.element_ty), mask=(n < N) & (k == 0))
