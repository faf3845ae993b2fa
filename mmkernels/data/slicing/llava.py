"""LLaVA-NeXT's pinpoints: the resolution of a list that keeps most of a picture, cut into square tiles."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mmkernels.data.slicing.plan import (
    Ints,
    Pair,
    Plan,
    Plans,
    cells,
    columns,
    merged,
    positive,
    scalar,
    sizes,
)

PINPOINTS: tuple[Pair, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def best_resolution(w: Ints, h: Ints, choices: Ints) -> Ints:
    """Index of the choice that keeps most pixels, then wastes fewest; the first of equals. int64 `[B]`; choices `[B, K, 2]`."""
    width, height = choices[..., 0], choices[..., 1]
    w, h = w[:, None], h[:, None]
    scale = np.minimum(width / w, height / h)
    shrunk = (w * scale).astype(np.int64) * (h * scale).astype(np.int64)
    effective = np.where(width > 0, np.minimum(shrunk, w * h), -1)
    waste = np.where(width > 0, width * height - effective, np.iinfo(np.int64).max)
    waste = np.where(effective == effective.max(1, keepdims=True), waste, np.iinfo(np.int64).max)
    return waste.argmin(1)


def fitted(w: Ints, h: Ints, width: Ints, height: Ints) -> tuple[Ints, Ints]:
    """Size of a picture that is scaled to touch the canvas from within, the free side rounded up."""
    sw, sh = width / w, height / h
    wide = sw < sh
    nw = np.where(wide, width, np.minimum(np.ceil(w * sh).astype(np.int64), width))
    nh = np.where(wide, np.minimum(np.ceil(h * sw).astype(np.int64), height), height)
    return nw, nh


def unpadded(w: Ints, h: Ints, rows: Ints, cols: Ints, rounding: str) -> tuple[Ints, Ints]:
    """Lines of padding to drop before and after the rows and the columns of a feature map."""
    wide = w / h > cols / rows
    kept = np.where(wide, h * (cols / w), w * (rows / h))
    kept = (np.round(kept, 7) if rounding == "hf" else kept).astype(np.int64)
    return np.where(wide, (rows - kept) // 2, 0), np.where(wide, 0, (cols - kept) // 2)


def parse_merge(merge: str) -> tuple[str, bool, int]:
    """How tiles become a sequence: (kind, with the overview, most tiles or 0), of LLaVA's `mm_patch_merge_type`."""
    capped = re.search(r"anyres_max_([1-9]\d*)", merge)
    parts = set((merge.replace(capped[0], "unpad") if capped else merge).split("_"))
    kinds = parts - {"nobase"}
    kinds = kinds - {"spatial"} if kinds & {"unpad", "maxpool2x2"} else kinds
    if len(kinds) != 1 or not kinds <= {"flat", "spatial", "unpad", "maxpool2x2"}:
        known = "flat, spatial, unpad, maxpool2x2 or anyres_max_N, and nobase"
        raise ValueError(f"merge: got {merge!r}, expected {known}, joined by _")
    return kinds.pop(), "nobase" not in parts, int(capped[1]) if capped else 0


def _layout(plan: Plan, side: int, kind: str, base: bool, most: int, rounding: str) -> Ints:
    first = side * side if base else 0
    rows, cols = plan.features
    if kind == "flat":
        tiles = np.arange(plan.grid[0] * plan.grid[1] * side * side)
    elif kind == "spatial":
        tiles = merged(plan, side).reshape(-1)
    elif kind == "maxpool2x2":
        tiles = np.arange(rows * cols)
    else:
        w, h, high, wide = (np.array([v]) for v in (*plan.size, plan.grid[1] * side, plan.grid[0] * side))
        (top,), (left,) = unpadded(w, h, high, wide, rounding)
        tiles = merged(plan, side)
        tiles = tiles[top : len(tiles) - top, left : tiles.shape[1] - left]
        if most and tiles.shape != (rows, cols):  # interpolated: the tokens of the smaller map
            tiles = np.arange(rows * cols).reshape(rows, cols)
        newline = np.full((rows, 1), -1 - first)
        tiles = np.concatenate([tiles, newline], 1).reshape(-1)
    return np.concatenate([np.arange(first), tiles + first])


def _choices(pinpoints: Sequence[Pair], tile: int, patch: int) -> Ints:
    positive(tile=tile, patch=patch)
    if tile < patch:
        raise ValueError(f"tile: got {tile}, expected at least one patch of {patch} pixels")
    choices = np.asarray(pinpoints)
    if choices.ndim != 2 or choices.shape[1] != 2 or not len(choices):
        raise ValueError(f"pinpoints: got {pinpoints!r}, expected one or more (width, height)")
    if not np.issubdtype(choices.dtype, np.integer) or (choices < tile).any() or (choices % tile).any():
        raise ValueError(f"pinpoints: got {pinpoints!r}, expected whole multiples of the tile, {tile}")
    return choices.astype(np.int64)


def llava_next(
    width: ArrayLike,
    height: ArrayLike,
    pinpoints: Sequence[Pair] = PINPOINTS,
    tile: int = 336,
    *,
    rounding: str = "llava",
    merge: str = "unpad",
    patch: int = 14,
) -> Plan | Plans:
    """Plans LLaVA-NeXT's "anyres": the whole picture squashed to one tile, then the tiles of the best resolution.

    `tokens = side² + h' (w' + 1)`, `side = tile // patch`, (h', w') the feature map without its padding.

    **Shapes** two numbers give a `Plan`, two arrays `[B]` give `Plans`. `pinpoints` are (width, height), and **their order
    matters**: the first of equals wins. Views: the overview, then the tiles; the separator is the newline that ends a row.
    `rounding="hf"` rounds to 7 digits before it cuts padding, as transformers does. `merge` is LLaVA's
    `mm_patch_merge_type`: `unpad`, `spatial`, `flat`, `maxpool2x2`, `anyres_max_N`, and `nobase`, joined by `_`.
    **Edge** Up to one line of padding survives; a picture so thin that no column is left gives newlines alone. Where a map is
    pooled or interpolated, `layout` counts the tokens of the smaller map after those of the overview.
    **Raises** ValueError, TypeError: a size below one or no integer; pinpoints that are no multiples of the tile; an unknown
    rounding or merge.
    **Source** github.com/haotian-liu/LLaVA `mm_utils.py`, github.com/LLaVA-VL/LLaVA-NeXT `llava_arch.py`.
    """
    w, h = sizes(width, height)
    choices = _choices(pinpoints, tile, patch)
    if rounding not in ("llava", "hf"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'llava' or 'hf'")
    kind, base, most = parse_merge(merge)
    best = choices[best_resolution(w, h, np.broadcast_to(choices, (len(w), *choices.shape)))]
    side = tile // patch
    nw, nh = fitted(w, h, best[:, 0], best[:, 1])
    grid = best // tile
    rows, cols = grid[:, 1] * side, grid[:, 0] * side
    if kind == "unpad":
        top, left = unpadded(w, h, rows, cols, rounding)
        rows, cols = rows - 2 * top, cols - 2 * left
        if most:
            times = np.sqrt(rows * cols / (most * side**2))
            small = times > 1.1
            times = np.where(small, times, 1)
            rows, cols = (np.where(small, np.floor(v // times).astype(np.int64), v) for v in (rows, cols))
    elif kind == "maxpool2x2":
        rows, cols = rows // 2, cols // 2
    tokens = (side * side if base else 0) + rows * (cols + (kind == "unpad"))
    plans = Plans(
        columns(w, h, w),
        grid,
        columns(nw, nh, w),
        columns((best[:, 0] - nw) // 2, (best[:, 1] - nh) // 2, w),
        columns(rows, cols, w),
        tokens,
        columns(tile, tile, w),
        columns(tile, tile, w) if base else columns(0, 0, w),
        ("newline",) if kind == "unpad" else (),
        functools.partial(cells, width=tile, height=tile),
        functools.partial(_layout, side=side, kind=kind, base=base, most=most, rounding=rounding),
    )
    return scalar(width, height, plans)
