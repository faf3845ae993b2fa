"""The published slicing rules, one picture at a time in plain Python, written from the rules and not from our plans."""

from __future__ import annotations

import math

PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


def best_resolution(w, h, choices):
    best, most, least = None, -1, math.inf
    for width, height in choices:
        scale = min(width / w, height / h)
        effective = min(int(w * scale) * int(h * scale), w * h)
        waste = width * height - effective
        if effective > most or (effective == most and waste < least):
            best, most, least = (width, height), effective, waste
    return best


def resized(w, h, width, height):
    sw, sh = width / w, height / h
    if sw < sh:
        nw, nh = width, min(math.ceil(h * sw), height)
    else:
        nw, nh = min(math.ceil(w * sh), width), height
    return (nw, nh), ((width - nw) // 2, (height - nh) // 2)


def unpad(w, h, ch, cw, rounding):
    """Rows and columns of the map that are kept, as ranges."""
    whole = (lambda v: int(round(v, 7))) if rounding == "hf" else int
    if w / h > cw / ch:
        p = (ch - whole(h * (cw / w))) // 2
        return range(p, ch - p), range(cw)
    p = (cw - whole(w * (ch / h))) // 2
    return range(ch), range(p, cw - p)


def llava_next(w, h, pinpoints=PINPOINTS, tile=336, rounding="llava"):
    width, height = best_resolution(w, h, pinpoints)
    size, offset = resized(w, h, width, height)
    cols, rows, side = width // tile, height // tile, tile // 14
    ys, xs = unpad(w, h, rows * side, cols * side, rounding)
    layout = list(range(side * side))
    for y in ys:
        for x in xs:
            t = (y // side) * cols + x // side
            layout.append(side * side * (1 + t) + (y % side) * side + x % side)
        layout.append(-1)
    return {
        "grid": (cols, rows),
        "resized": size,
        "offset": offset,
        "features": (len(ys), len(xs)),
        "layout": layout,
        "tokens": side * side + len(ys) * (len(xs) + 1),
    }


def _pairs(counts):
    return [(c, n // c) for n in counts for c in range(1, n + 1) if n % c == 0]


def _nearest(w, h, pairs):
    best, least = None, math.inf
    for c, r in pairs:
        distance = abs(math.log(c / r) - math.log(w / h))
        if distance < least:
            best, least = (c, r), distance
    return best


def adapt(h, w):
    s = math.sqrt(576 * (14 / h) * (14 / w))
    ph = min(max(math.floor(s * h / 14), 1), 576)
    pw = min(max(math.floor(s * w / 14), 1), 576)
    return ph, pw


def _layout(c, r, per_view):
    if c * r == 1:
        return list(range(per_view))
    layout, at = [], 0
    for _ in range(r):
        for x in range(c):
            layout += [*range(at, at + per_view), -2 if x == c - 1 else -1]
            at += per_view
    return layout + list(range(at, at + per_view))


def uhd_original(w, h):
    n = min(math.ceil(w * h / (336 * 336)), 6)
    c, r = _nearest(w, h, _pairs([n, n + 1] if n <= 2 else [n - 1, n, n + 1]))
    boxes = [(i * w // c, j * h // r, (i + 1) * w // c, (j + 1) * h // r) for j in range(r) for i in range(c)]
    ph, pw = adapt(h // r, w // c)
    oh, ow = adapt(h, w)
    return {
        "grid": (c, r),
        "boxes": boxes,
        "resized": (w, h),
        "features": (ph, pw),
        "slice_size": (pw * 14, ph * 14),
        "overview_size": (ow * 14, oh * 14) if c * r > 1 else None,
        "layout": _layout(c, r, 64),
        "tokens": 64 if c * r == 1 else 64 * (c * r + 1) + c * r,
    }


def _best(w, h, upscale):
    if w * h > 336 * 336 or upscale:
        ratio = w / h
        h = int(336 / math.sqrt(ratio))
        w = int(h * ratio)
    return max(math.floor(w / 14) * 14, 14), max(math.floor(h / 14) * 14, 14)


def uhd_eccv(w, h):
    n = min(math.ceil(w * h / (336 * 336)), 7)
    if n <= 1:
        whole = _best(w, h, True)
        return {
            "grid": (1, 1),
            "boxes": [],
            "resized": whole,
            "slice_size": None,
            "overview_size": whole,
            "layout": list(range(144)),
            "tokens": 144,
        }
    c, r = _nearest(w, h, _pairs([k for k in (n - 1, n, n + 1) if 1 < k <= 7]))
    rw, rh = max(math.floor(w / c) * c, c), max(math.floor(h / r) * r, r)
    gw, gh = _best(rw / c, rh / r, True)
    boxes = [(x, y, x + gw, y + gh) for y in range(0, gh * r, gh) for x in range(0, gw * c, gw)]
    return {
        "grid": (c, r),
        "boxes": boxes,
        "resized": (gw * c, gh * r),
        "slice_size": (gw, gh),
        "overview_size": _best(w, h, False),
        "layout": _layout(c, r, 144),
        "tokens": 144 * (c * r + 1) + c * r,
    }


def fuyu(w, h):
    if w > 1920 or h > 1080:
        s = min(1080 / h, 1920 / w)
        w, h = int(w * s), int(h * s)
    if w < 1 or h < 1:
        return None
    cols, rows = min(1920, math.ceil(w / 30) * 30) // 30, min(1080, math.ceil(h / 30) * 30) // 30
    layout = [v for y in range(rows) for v in [*range(y * cols, (y + 1) * cols), -1]]
    return {
        "grid": (cols, rows),
        "resized": (w, h),
        "features": (rows, cols),
        "tokens": rows * (cols + 1),
        "layout": layout,
    }


def slime(w, h):
    n = max(min(math.ceil(w * h / 336**2), 6), 2)
    pairs = _pairs([n, n + 1] if n <= 2 else [n - 1, n, n + 1])
    width, height = best_resolution(w, h, [(c * 336, r * 336) for c, r in pairs])
    cols, rows = width // 336, height // 336
    size, offset = resized(w, h, width, height)
    local = [
        577 - 1 + 144 * ((y // 12) * cols + x // 12) + (y % 12) * 12 + x % 12
        for y in range(12 * rows)
        for x in range(12 * cols)
    ]
    return {
        "grid": (cols, rows),
        "resized": size,
        "offset": offset,
        "features": (12 * rows, 12 * cols),
        "tokens": 577 + 144 * cols * rows,
        "layout": [*range(576), -1, *local],
    }
