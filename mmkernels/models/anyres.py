"""LLaVA-NeXT: features of a picture's tiles, joined to one map and written row by row behind those of the whole picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives import _check


class Plan(Protocol):
    """What is read of a `data.slicing.Plan`; sizes are (width, height), `features` is (rows, columns)."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def features(self) -> tuple[int, int]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def views(self) -> int: ...
    @property
    def separators(self) -> tuple[str, ...]: ...
    @property
    def layout(self) -> Any: ...


def merge_anyres(
    features: Tensor, plan: Plan | None, newline: Tensor | None = None, *, rounding: str = "llava"
) -> Tensor:
    """Features of one picture's views -> its tokens, in the order of `plan.layout`: the whole picture, then the joined map of
    the tiles without the padding, a newline behind every row.

    **Shapes** features `[N, P, C]` of the plan's views, the whole picture first, P a square; newline `[C]`, where the layout
    has one -> `[plan.tokens, C]`. Without a plan: one view -> `[P + 1, C]` with a newline, `[P, C]` without.
    **Gradient** features and newline. **Edge** `maxpool2x2` takes the largest of 2 x 2; `anyres_max_N` shrinks a larger map
    bilinearly (`align_corners=False`, no antialias) before newlines are written; its padding is cut with `rounding`.
    **Raises** ValueError for shapes, another number of views, and a newline that is missing.
    **Source** LLaVA-NeXT's `llava_arch.py`; plans by `data.slicing.llava_next`. **Speed** one gather.
    """
    size = _check.shapes(features=(features, "N P C"), newline=(newline, "C"))
    if plan is None:
        if size["N"] != 1:
            raise ValueError(f"features: got {size['N']} views without a plan, expected one")
        return features[0] if newline is None else torch.cat([features[0], newline[None].to(features.dtype)])
    if size["N"] != plan.views:
        raise ValueError(f"features: got {size['N']} views, expected the plan's {plan.views}")
    if plan.separators and newline is None:
        raise ValueError("newline: got None, expected [C]: the plan's rows end with one")
    rows = _rows(features, plan, rounding)
    if plan.separators and newline is not None:
        rows = torch.cat([rows, newline[None].to(rows.dtype)])
    layout = torch.tensor(plan.layout, device=rows.device)
    return rows[torch.where(layout < 0, len(rows) - 1, layout)]


class Media(NamedTuple):
    """Visual tokens before they are put in order: rows `[R, C]`, and for every place of the batch, order int64 `[V]`, the row
    that comes there or -2 for a newline.
    """

    rows: Tensor
    order: Tensor


def order_views(features: Tensor, plans: Sequence[Plan], *, rounding: str = "llava") -> Media:
    """The tokens of several pictures, whose views follow one another in features `[N, P, C]`; nothing is copied but where maps
    are made smaller.
    """
    views = [plan.views for plan in plans]
    if sum(views) != features.shape[0]:
        raise ValueError(f"images: got {features.shape[0]} views, expected {sum(views)}, as the plans say")
    made = [_rows(f, plan, rounding) for f, plan in zip(features.split(views), plans, strict=True)]
    whole = all(len(rows) == n * features.shape[1] for rows, n in zip(made, views, strict=True))
    starts = np.cumsum([0, *map(len, made)])
    order = [np.where(p.layout < 0, -2, p.layout + at) for p, at in zip(plans, starts, strict=False)]
    index = torch.from_numpy(np.concatenate(order)).to(features.device)
    return Media(features.flatten(0, 1) if whole else torch.cat(made), index)


def _rows(features: Tensor, plan: Plan, rounding: str) -> Tensor:
    """What the layout counts: tokens of all views, or of the whole picture and of a smaller map."""
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        raise ValueError(f"features: got {features.shape[1]} tokens a view, expected a square")
    columns, rows = (n * side for n in plan.grid)
    if not plan.separators and plan.features == (rows // 2, columns // 2):
        return _joined(features, plan, side, lambda x: F.max_pool2d(x, 2))
    if not plan.separators:
        return features.flatten(0, 1)
    top, left = _padding(plan.size, rows, columns, rounding)
    if (rows - 2 * top, columns - 2 * left) == plan.features:
        return features.flatten(0, 1)

    def shrink(x: Tensor) -> Tensor:
        kept = x[:, :, top : rows - top, left : columns - left]
        return F.interpolate(kept, plan.features, mode="bilinear", align_corners=False)

    return _joined(features, plan, side, shrink)


def _joined(features: Tensor, plan: Plan, side: int, smaller: Any) -> Tensor:
    """The tokens of the whole picture, if there is one, and those of the map that `smaller` makes of the tiles'."""
    columns, rows = plan.grid
    whole, tiles = features.split((plan.views - rows * columns, rows * columns))
    joined = tiles.unflatten(1, (side, side)).unflatten(0, (rows, columns)).permute(4, 0, 2, 1, 3)
    made = smaller(joined.flatten(3).flatten(1, 2)[None])
    return torch.cat([whole.flatten(0, 1), made[0].flatten(1).T])


def _padding(size: tuple[int, int], rows: int, columns: int, rounding: str) -> tuple[int, int]:
    """Lines to drop above and below, and left and right: in float64 and in this order of operations, as published."""
    _check.choice("rounding", rounding, ("llava", "hf"))
    w, h = size
    wide = w / h > columns / rows
    kept = h * (columns / w) if wide else w * (rows / h)
    kept = int(round(kept, 7) if rounding == "hf" else kept)
    return ((rows - kept) // 2, 0) if wide else (0, (columns - kept) // 2)
