"""Device helpers that Triton kernels of several rooms share: tiles of any width, the dropout hash, the lowest set bit.

A head of D numbers is cut into parts that are powers of two (72 = 64 + 8 in a part of 16), because a Triton tile must be one:
a tile "in parts" is a tuple of blocks [rows, part], and a product over D is the sum of the products of the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def width(parts, i):
    return parts[i]


@triton.constexpr_function
def offset(parts, i):
    return sum(parts[:i])


@triton.constexpr_function
def overhangs(parts, i, size):
    return sum(parts[: i + 1]) > size


@triton.jit
def load(base, at, ok, D: tl.constexpr, PARTS: tl.constexpr):
    """The rows at `base + at` in parts; a row that is not ok, and a column past D, is 0 and is not read."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        c = offset(PARTS, i) + tl.arange(0, width(PARTS, i))
        if overhangs(PARTS, i, D):
            tile = tl.load(base + at[:, None] + c[None, :], mask=ok[:, None] & (c < D)[None, :], other=0.0)
        else:
            tile = tl.load(base + at[:, None] + c[None, :], mask=ok[:, None], other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store(base, at, ok, tiles, D: tl.constexpr, PARTS: tl.constexpr):
    for i in tl.static_range(len(PARTS)):
        c = offset(PARTS, i) + tl.arange(0, width(PARTS, i))
        tile = tiles[i].to(base.dtype.element_ty)
        tl.store(base + at[:, None] + c[None, :], tile, mask=ok[:, None] & (c < D)[None, :])


@triton.jit
def zeros(rows: tl.constexpr, PARTS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.zeros([rows, width(PARTS, i)], tl.float32),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Every row times its factor."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (tiles[i] * factor[:, None],)
    return result


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """a b^T [rows of a, rows of b]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(tiles, p, b, PRECISION: tl.constexpr):
    """tiles + p b, p being rounded to the dtype of b."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (tl.dot(p.to(b[i].dtype), b[i], tiles[i], input_precision=PRECISION),)
    return result


@triton.jit
def mix(x):
    """A 32-bit integer hash: every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def members(chosen):
    """The set {i: chosen[i]} of at most 64 as the bits of a uint64."""
    return tl.sum(chosen.to(tl.uint64) << tl.arange(0, chosen.shape[0]).to(tl.uint64), 0)


@triton.jit
def contains(word, n: tl.constexpr):
    """For every i < n whether the set has it."""
    return ((word >> tl.arange(0, n).to(tl.int64)) & 1) != 0


@triton.jit
def lowest(word):
    """The smallest element of a set: a power of two is exact in float32, whose exponent is its index."""
    alone = word ^ (word & (word - 1))
    return (alone.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def size(word):
    """How many elements a set has."""
    word -= (word >> 1) & 0x5555555555555555
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56).to(tl.int32)


@triton.jit
def summed(a, b):
    result = ()
    for i in tl.static_range(len(a)):
        result = result + (a[i] + b[i],)
    return result


@triton.jit
def where(ok, tiles):
    """Rows that are not ok become 0 by selection, whatever they hold."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (tl.where(ok[:, None], tiles[i], 0.0),)
    return result


@triton.jit
def row_sums(a, b):
    """Inner products of the rows of a with those of b, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total
