"""The router's kernels, and the sum of a token's rows.

Plan. A program owns a block of tokens and all experts of them, in registers: `choose` reads the logits once, picks K experts,
and leaves for its block how many routes go to each expert and its share of the losses; `arrive`, after a prefix sum over the
blocks, gives every route its slot, its place and its weight. Experts come in powers of two, the surplus at minus infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.402823466e38)
SMALLEST = tl.constexpr(1.175494351e-38)
EPSILON = tl.constexpr(1.1920929e-7)


@triton.jit
def finite(x):
    """NaN is the lowest number, infinities are the largest and lowest."""
    x = tl.where(x != x, -LARGEST, x)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def probabilities(logits, stride, t, e, T, E):
    """The finite row, p, its log-sum-exp, and whether the row is sane."""
    inside = (t < T)[:, None] & (e < E)[None, :]
    raw = tl.load(logits + (t.to(tl.int64) * stride)[:, None] + e[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    bad = tl.max(((raw != raw) | (raw > LARGEST)).to(tl.int32), 1)
    number = tl.max(((raw >= -LARGEST) & inside).to(tl.int32), 1)
    row = tl.where((e < E)[None, :], finite(raw), -float("inf"))
    top = tl.max(row, 1)
    p = tl.exp(row - top[:, None])
    total = tl.sum(p, 1)
    return row, p / total[:, None], top + tl.log(total), (bad == 0) & (number > 0)


@triton.jit
def largest(left, e, EP: tl.constexpr):
    """The first place of each row's largest number."""
    best = tl.max(left, 1)
    return tl.min(tl.where(left == best[:, None], e[None, :], EP), 1)


@triton.jit
def choose(
    logits, noise, mask, experts, chosen, found, share, square,
    stride, T, E, blocks,
    K: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, CHOICES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """experts, chosen probabilities [T, K]; found [blocks, E] (CHOICES: [K, blocks, E]); share [blocks, E]; square [blocks]."""
    block = tl.program_id(0)
    t, e = block * ROWS + tl.arange(0, ROWS), tl.arange(0, EP)
    row, p, lse, sane = probabilities(logits, stride, t, e, T, E)
    used = t < T
    if mask is not None:
        used = used & (tl.load(mask + t, mask=t < T, other=0) != 0)
    left = row
    if noise is not None:
        inside = (t < T)[:, None] & (e < E)[None, :]
        more = tl.load(noise + (t.to(tl.int64) * E)[:, None] + e[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        left = tl.where((e < E)[None, :], finite(row + more), -float("inf"))
    taken = tl.zeros([ROWS, EP], tl.int32)
    for j in tl.static_range(K):
        at = largest(left, e, EP)
        if CHOICES and noise is not None and j == 0:
            at = largest(row, e, EP)
        one = e[None, :] == at[:, None]
        left = tl.where(one, -float("inf"), left)
        place = t.to(tl.int64) * K + j
        tl.store(experts + place, at, mask=t < T)
        tl.store(chosen + place, tl.sum(tl.where(one, p, 0.0), 1), mask=t < T)
        hits = (one & used[:, None]).to(tl.int32)
        taken += hits
        if CHOICES:
            tl.store(found + (j * blocks + block).to(tl.int64) * E + e, tl.sum(hits, 0), mask=e < E)
    if not CHOICES:
        tl.store(found + block.to(tl.int64) * E + e, tl.sum(taken, 0), mask=e < E)
    counts = used
    if WHOLE:
        counts = t < T
    tl.store(share + block.to(tl.int64) * E + e, tl.sum(tl.where(counts[:, None], p, 0.0), 0), mask=e < E)
    tl.store(square + block, tl.sum(tl.where(used & sane, lse * lse, 0.0), 0))


@triton.jit
def slot_of(one, before, first, offsets, block, e, E, CHOICES: tl.constexpr):
    """The slot of each token's route to `one`, and the place where its expert's rows start."""
    if CHOICES:
        own = one.to(tl.int32)
        before = tl.cumsum(own, 0) - own
    start = tl.load(first + block.to(tl.int64) * E + e, mask=e < E, other=0)
    base = tl.load(offsets + e, mask=e < E, other=0)
    slot = tl.sum(tl.where(one, before + start[None, :], 0), 1)
    return slot, tl.sum(tl.where(one, base[None, :], 0), 1)


@triton.jit
def arrive(
    experts, mask, first, offsets, weights, order, inverse,
    T, E, blocks, capacity,
    K: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, CHOICES: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """first [blocks, E] (CHOICES: [K, blocks, E]): the slot of the block's first route to e; weights hold the chosen p."""
    block = tl.program_id(0)
    t, e = block * ROWS + tl.arange(0, ROWS), tl.arange(0, EP)
    used = t < T
    if mask is not None:
        used = used & (tl.load(mask + t, mask=t < T, other=0) != 0)
    taken = tl.zeros([ROWS, EP], tl.int32)
    for j in tl.static_range(K):
        at = tl.load(experts + t.to(tl.int64) * K + j, mask=t < T, other=-1)
        taken += ((e[None, :] == at[:, None]) & used[:, None]).to(tl.int32)
    before = tl.cumsum(taken, 0) - taken
    total = tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(K):
        route = t.to(tl.int64) * K + j
        at = tl.load(experts + route, mask=t < T, other=-1)
        one = (e[None, :] == at[:, None]) & used[:, None]
        near = block
        if CHOICES:
            near = block + j * blocks
        slot, base = slot_of(one, before, first, offsets, near, e, E, CHOICES)
        kept = used & (slot < capacity)
        tl.store(inverse + route, tl.where(kept, base + slot, -1), mask=t < T)
        tl.store(order + base + slot, route.to(tl.int32), mask=kept)
        p = tl.load(weights + route, mask=t < T, other=0.0)
        if NORMALIZE == "before":
            total += p
        if NORMALIZE == "after":
            total += tl.where(kept, p, 0.0)
    if NORMALIZE == "before":
        total = tl.maximum(total, SMALLEST)
    elif NORMALIZE == "after":
        total = tl.maximum(total, EPSILON)
    else:
        total += 1.0
    for j in tl.static_range(K):
        route = t.to(tl.int64) * K + j
        at = tl.load(experts + route, mask=t < T, other=-1)
        one = (e[None, :] == at[:, None]) & used[:, None]
        near = block
        if CHOICES:
            near = block + j * blocks
        slot, _ = slot_of(one, before, first, offsets, near, e, E, CHOICES)
        p = tl.load(weights + route, mask=t < T, other=0.0)
        tl.store(weights + route, tl.where(used & (slot < capacity), p / total, 0.0), mask=t < T)


@triton.jit
def choose_backward(
    dweights, daux, dz, logits, mask, experts, inverse, share, tokens, dlogits,
    stride, T, E,
    K: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """share [E]: what p[t, e] weighs in the auxiliary loss; tokens: how many the losses average over."""
    t, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, EP)
    _, p, lse, sane = probabilities(logits, stride, t, e, T, E)
    used = t < T
    if mask is not None:
        used = used & (tl.load(mask + t, mask=t < T, other=0) != 0)
    total, dot = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for j in tl.static_range(K):
        route = t.to(tl.int64) * K + j
        at = tl.load(experts + route, mask=t < T, other=-1)
        kept = tl.load(inverse + route, mask=t < T, other=-1) >= 0
        mine = tl.sum(tl.where(e[None, :] == at[:, None], p, 0.0), 1)
        if NORMALIZE == "before":
            total += mine
        if NORMALIZE == "after":
            total += tl.where(kept, mine, 0.0)
        dot += tl.where(kept, tl.load(dweights + route, mask=t < T, other=0.0) * mine, 0.0)
    floor = 0.0
    if NORMALIZE == "before":
        floor = SMALLEST
    if NORMALIZE == "after":
        floor = EPSILON
    clamped = total <= floor
    total = tl.maximum(total, floor)
    if NORMALIZE == "":
        total += 1.0
    counted = used
    if WHOLE:
        counted = t < T
    g = tl.load(share + e, mask=e < E, other=0.0) * tl.load(daux)
    g = tl.where(counted[:, None], g[None, :], 0.0)
    for j in tl.static_range(K):
        route = t.to(tl.int64) * K + j
        at = tl.load(experts + route, mask=t < T, other=-1)
        kept = tl.load(inverse + route, mask=t < T, other=-1) >= 0
        d = tl.where(kept, tl.load(dweights + route, mask=t < T, other=0.0) / total, 0.0)
        if NORMALIZE == "before":
            d -= tl.where(clamped, 0.0, dot / total / total)
        if NORMALIZE == "after":
            d -= tl.where(clamped | (kept == 0), 0.0, dot / total / total)
        g += tl.where(e[None, :] == at[:, None], d[:, None], 0.0)
    less = tl.sum(g * p, 1) - tl.where(used, 2.0 * tl.load(dz) * lse / tl.load(tokens), 0.0)
    found = tl.where(sane[:, None], p * (g - less[:, None]), 0.0)
    to = dlogits + (t.to(tl.int64) * E)[:, None] + e[None, :]
    tl.store(to, found.to(dlogits.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit
def combine(y, weights, inverse, out, rows, C, K, NB: tl.constexpr):
    """out[t] = sum_j weights[t, j] y[inverse[t K + j]], j after j; without weights the plain sum."""
    blocks = tl.cdiv(C, NB)
    t, n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * NB + tl.arange(0, NB)
    acc = tl.zeros([NB], tl.float32)
    for j in range(K):
        at = tl.load(inverse + t * K + j).to(tl.int64)
        some = (at >= 0) & (at < rows)
        row = tl.load(y + at * C + n, mask=some & (n < C), other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + t * K + j).to(tl.float32)
        acc += tl.where(some, row, 0.0)
    tl.store(out + t * C + n, acc.to(out.dtype.element_ty), mask=n < C)
