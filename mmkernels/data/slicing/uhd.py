"""LLaVA-UHD's slices: a grid as close as can be to the shape of the picture, each slice at its own size."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import ArrayLike

from mmkernels.data.slicing.plan import Ints, Pair, Plan, Plans, cells, columns, positive, scalar, sizes


def grids(products: list[int]) -> list[Pair]:
    """(columns, rows) of every product, in the order given, columns ascending."""
    return [(c, p // c) for p in products for c in range(1, p + 1) if p % c == 0]


def products(count: int, *, release: str, most: int) -> list[int]:
    """How many slices a picture whose area asks for `count` may be cut into."""
    if release == "eccv":
        return [n for n in (count - 1, count, count + 1) if 1 < n <= most]
    return [count, count + 1] if count <= 2 else [count - 1, count, count + 1]


def closest(w: Ints, h: Ints, count: Ints, *, release: str, most: int) -> Ints:
    """The first grid whose shape is nearest to the picture's, by the logarithm of the ratio: int64 `[B, 2]`."""
    best = np.ones((len(w), 2), dtype=np.int64)
    for n in np.unique(count).tolist():
        choices = grids(products(n, release=release, most=most))
        if (release == "eccv" and n <= 1) or not choices:
            continue
        at = np.flatnonzero(count == n)
        # math.log and no other: at a tie its last bit decides, as it did for the authors
        shape = np.array([math.log(ratio) for ratio in (w[at] / h[at]).tolist()])
        of_grid = np.array([math.log(c / r) for c, r in choices])
        best[at] = np.array(choices)[np.abs(of_grid - shape[:, None]).argmin(1)]
    return best


def adapt(h: Ints, w: Ints, patch: int, patches: int) -> Ints:
    """(columns, rows) of patches: the picture scaled, up or down, to at most `patches`. int64 `[B, 2]`."""
    scale = np.sqrt(patches * (patch / h) * (patch / w))
    sides = [np.clip(np.floor(scale * v / patch).astype(np.int64), 1, patches) for v in (w, h)]
    return np.stack(sides, 1)


def best_size(w: Ints, h: Ints, scale: int, patch: int) -> Ints:
    """(width, height) of about scale² pixels at the same shape, each side whole patches. int64 `[B, 2]`."""
    ratio = w / h
    height = (scale / np.sqrt(ratio)).astype(np.int64)
    width = (height * ratio).astype(np.int64)
    return np.stack([np.maximum(v // patch * patch, patch) for v in (width, height)], 1)


def _cut_first(plan: Plan) -> Ints:
    (w, h), (c, r) = plan.size, plan.grid
    rows, cols = np.divmod(np.arange(c * r), c)
    return np.stack([cols * w // c, rows * h // r, (cols + 1) * w // c, (rows + 1) * h // r], 1)


def _cut_last(plan: Plan) -> Ints:
    if plan.slice_size is None:
        return np.zeros((0, 4), dtype=np.int64)
    return cells(plan, *plan.slice_size)


def _layout(plan: Plan, per_view: int) -> Ints:
    """Each slice and its separator, a comma or at the end of a row a newline; the overview last, without one."""
    c, r = plan.grid
    if c * r == 1:
        return np.arange(per_view)
    body = np.full((c * r, per_view + 1), -1)
    body[:, :-1] = np.arange(c * r * per_view).reshape(c * r, per_view)
    body[c - 1 :: c, -1] = -2
    return np.concatenate([body.reshape(-1), np.arange(per_view) + c * r * per_view])


def _original(w: Ints, h: Ints, scale: int, patch: int, most: int) -> list[Ints]:
    grid = closest(w, h, np.minimum(-(-w * h // scale**2), most), release="original", most=most)
    patches = (scale // patch) ** 2
    slices = adapt(h // grid[:, 1], w // grid[:, 0], patch, patches)
    whole = np.where((grid.prod(1) > 1)[:, None], adapt(h, w, patch, patches), 0)
    return [grid, columns(w, h, w), slices[:, ::-1], slices * patch, whole * patch]


def _eccv(w: Ints, h: Ints, scale: int, patch: int, most: int) -> list[Ints]:
    count = np.minimum(-(-w * h // scale**2), most)
    grid = closest(w, h, count, release="eccv", most=most)
    cut = grid.prod(1) > 1
    side = np.maximum(columns(w, h, w) // grid, 1)
    slices = best_size(side[:, 0], side[:, 1], scale, patch)
    whole = best_size(w, h, scale, patch)
    size = np.where(cut[:, None], slices, 0)
    resized = np.where(cut[:, None], slices * grid, whole)
    return [grid, resized, np.where(cut[:, None], slices, whole)[:, ::-1] // patch, size, whole]


def llava_uhd(
    width: ArrayLike,
    height: ArrayLike,
    max_slices: int | None = None,
    scale: int = 336,
    *,
    release: str = "original",
    patch: int = 14,
    tokens_per_view: int | None = None,
) -> Plan | Plans:
    """Plans LLaVA-UHD's slices: about `ceil(w h / scale²)` of them, in the grid whose shape is nearest to the picture's.

    `tokens = tokens_per_view (n + 1) + n` for n slices: a comma after each, a newline after a row, the overview last.

    **Shapes** two numbers give a `Plan`, two arrays `[B]` give `Plans`; separators: -1 the comma, -2 the newline.
    `release="original"` cuts first (`boxes` are of the picture) and fits each slice into (scale / patch)² patches: at most 6
    slices asked for and 7 made, 64 tokens a view. `"eccv"` resizes first (`boxes` are of `resized`): at most 7, 144 tokens.
    `features` are the patches of a slice.
    **Edge** A picture that is not cut is one view: in the original release one slice and no overview, in ECCV's an overview and
    no slice, scaled up if it is small.
    **Raises** ValueError, TypeError: a size below one or no integer; an unknown release.
    **Source** arXiv 2403.11703, github.com/thunlp/LLaVA-UHD.
    """
    w, h = sizes(width, height)
    if release not in ("original", "eccv"):
        raise ValueError(f"release: got {release!r}, expected 'original' or 'eccv'")
    most = (6 if release == "original" else 7) if max_slices is None else max_slices
    per_view = (64 if release == "original" else 144) if tokens_per_view is None else tokens_per_view
    positive(max_slices=most, scale=scale, patch=patch, tokens_per_view=per_view)
    if scale < patch:
        raise ValueError(f"scale: got {scale}, expected at least one patch of {patch} pixels")
    original = release == "original"
    grid, resized, features, slices, whole = (_original if original else _eccv)(w, h, scale, patch, most)
    count = grid.prod(1)
    plans = Plans(
        columns(w, h, w),
        grid,
        resized,
        columns(0, 0, w),
        features,
        np.where(count > 1, per_view * (count + 1) + count, per_view),
        slices,
        whole,
        ("comma", "newline"),
        _cut_first if original else _cut_last,
        functools.partial(_layout, per_view=per_view),
    )
    return scalar(width, height, plans)
