"""Resize, normalise and cut in one kernel: a program makes pixels of one patch, all three channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _byte(total):
    """A sum of 22 fractional bits, rounded to 0..255."""
    return tl.minimum(tl.maximum((total + (1 << 21)) >> 22, 0), 255)


@triton.jit
def patch_rows(
    pixels, rows, jobs, first, count, weights, table, out,
    P: tl.constexpr, LAST: tl.constexpr, REAL: tl.constexpr, JOB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows[n]: job, y, x of a patch in its resized picture. The axis that is resized first is the inner loop."""
    n, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = jobs + tl.load(rows + 3 * n).to(tl.int64) * JOB
    y, x = tl.load(rows + 3 * n + 1) + i // P, tl.load(rows + 3 * n + 2) + i % P
    there = (i < P * P) & (y >= 0) & (x >= 0) & (y < tl.load(mine + 4)) & (x < tl.load(mine + 3))
    down_first = tl.load(mine + 12) != 0
    sy, sx = tl.load(mine + 1), tl.load(mine + 2)
    axis_x, taps_x, wide_x = tl.load(mine + 6), tl.load(mine + 7), tl.load(mine + 8)
    axis_y, taps_y, wide_y = tl.load(mine + 9), tl.load(mine + 10), tl.load(mine + 11)
    o, p = tl.where(down_first, x, y), tl.where(down_first, y, x)  # places on the outer and on the inner axis
    so, sp = tl.where(down_first, sx, sy), tl.where(down_first, sy, sx)
    axis_o, axis_p = tl.where(down_first, axis_x, axis_y) + o, tl.where(down_first, axis_y, axis_x) + p
    wo = weights + tl.where(down_first, taps_x + x.to(tl.int64) * wide_x, taps_y + y.to(tl.int64) * wide_y)
    wp = weights + tl.where(down_first, taps_y + y.to(tl.int64) * wide_y, taps_x + x.to(tl.int64) * wide_x)
    count_o, count_p = (
        tl.load(count + axis_o, mask=there, other=0),
        tl.load(count + axis_p, mask=there, other=0),
    )
    at = tl.load(first + axis_o, mask=there, other=0) * so + tl.load(first + axis_p, mask=there, other=0) * sp
    source = pixels + tl.load(mine) + at
    kind: tl.constexpr = tl.float32 if REAL else tl.int32
    red, green, blue = tl.zeros([BLOCK], kind), tl.zeros([BLOCK], kind), tl.zeros([BLOCK], kind)
    for a in range(tl.max(count_o, 0)):
        has_o = there & (a < count_o)
        r, g, b = tl.zeros([BLOCK], kind), tl.zeros([BLOCK], kind), tl.zeros([BLOCK], kind)
        for c in range(tl.max(count_p, 0)):
            has = has_o & (c < count_p)
            k = tl.load(wp + c, mask=has, other=0)
            from_ = source + a * so + c * sp
            r += k * tl.load(from_, mask=has, other=0).to(kind)
            g += k * tl.load(from_ + 1, mask=has, other=0).to(kind)
            b += k * tl.load(from_ + 2, mask=has, other=0).to(kind)
        if not REAL:
            r, g, b = _byte(r), _byte(g), _byte(b)
        k = tl.load(wo + a, mask=has_o, other=0)
        red, green, blue = red + k * r, green + k * g, blue + k * b
    whole = i < P * P
    if REAL:
        r = red * tl.load(table) + tl.load(table + 3)
        g = green * tl.load(table + 1) + tl.load(table + 4)
        b = blue * tl.load(table + 2) + tl.load(table + 5)
    else:
        fill = tl.load(mine + 5).to(tl.int32)
        r = tl.load(table + tl.where(there, _byte(red), fill), mask=whole, other=0)
        g = tl.load(table + 256 + tl.where(there, _byte(green), fill), mask=whole, other=0)
        b = tl.load(table + 512 + tl.where(there, _byte(blue), fill), mask=whole, other=0)
    step: tl.constexpr = 1 if LAST else P * P
    to = out + n.to(tl.int64) * (3 * P * P) + (3 * i if LAST else i)
    tl.store(to, r.to(out.dtype.element_ty), mask=whole)
    tl.store(to + step, g.to(out.dtype.element_ty), mask=whole)
    tl.store(to + 2 * step, b.to(out.dtype.element_ty), mask=whole)
