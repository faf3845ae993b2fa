"""SliME's tiles: LLaVA-UHD's candidates, judged by LLaVA-NeXT's rule."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike

from mmkernels.data.slicing.llava import best_resolution, fitted
from mmkernels.data.slicing.plan import Ints, Plan, Plans, cells, columns, merged, positive, scalar, sizes
from mmkernels.data.slicing.uhd import grids, products


def _layout(plan: Plan, views: int, side: int) -> Ints:
    local = merged(plan, side).reshape(-1)
    return np.concatenate([np.arange(views), [-1], local + views])


def slime(
    width: ArrayLike,
    height: ArrayLike,
    max_slices: int = 6,
    tile: int = 336,
    *,
    patch: int = 14,
    tokens_per_view: int = 144,
) -> Plan | Plans:
    """Plans SliME's tiles: the whole picture squashed to one tile, a separator, then the local tokens of 2 to 7 tiles.

    `tokens = (tile / patch)² + 1 + tokens_per_view n`, before the router drops some.

    **Shapes** two numbers give a `Plan`, two arrays `[B]` give `Plans`. Views: the overview, then the tiles; local tokens
    stand in rows of the joined map `features`. The separator is the embedding of a comma.
    **Edge** Even the smallest picture is cut in two.
    **Raises** ValueError, TypeError: a size below one or no integer; `tokens_per_view` that is no square.
    **Source** github.com/yfzhang114/SliME `mm_utils.py`.
    """
    w, h = sizes(width, height)
    positive(max_slices=max_slices, tile=tile, patch=patch, tokens_per_view=tokens_per_view)
    side = int(np.sqrt(tokens_per_view))
    if side * side != tokens_per_view:
        raise ValueError(f"tokens_per_view: got {tokens_per_view}, expected a square number")
    count = np.maximum(np.minimum(-(-w * h // tile**2), max_slices), 2)
    grid = np.zeros((len(w), 2), dtype=np.int64)
    for n in np.unique(count).tolist():
        at = np.flatnonzero(count == n)
        choices = np.array(grids(products(n, release="original", most=max_slices)))
        canvases = np.broadcast_to(choices * tile, (len(at), *choices.shape))
        grid[at] = choices[best_resolution(w[at], h[at], canvases)]
    full = grid * tile
    nw, nh = fitted(w, h, full[:, 0], full[:, 1])
    views = (tile // patch) ** 2
    plans = Plans(
        columns(w, h, w),
        grid,
        columns(nw, nh, w),
        columns((full[:, 0] - nw) // 2, (full[:, 1] - nh) // 2, w),
        columns(grid[:, 1] * side, grid[:, 0] * side, w),
        views + 1 + tokens_per_view * grid.prod(1),
        columns(tile, tile, w),
        columns(tile, tile, w),
        ("comma",),
        functools.partial(cells, width=tile, height=tile),
        functools.partial(_layout, views=views, side=side),
    )
    return scalar(width, height, plans)
