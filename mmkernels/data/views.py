"""What a vision tower of squares is shown of a picture of any size: its middle, all of it padded, or all of it and its tiles.

Every view is an affine map of the picture, so that places in the picture are known in the view.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkernels.data.images import MEAN
from mmkernels.data.slicing import Plan, llava_next

ASPECTS = ("square", "pad", "anyres")
_MEAN = tuple(int(255 * value) for value in MEAN)  # (122, 116, 104)
_BICUBIC = Image.Resampling.BICUBIC


def views(image: Image.Image, aspect: str, size: int, plan: Plan | None = None) -> NDArray[np.uint8]:
    """A picture -> its views uint8 `[N, S, S, 3]`, as LLaVA's code makes them.

    - "square": the shorter side becomes `size`, bicubic, and the middle is cut out.
    - "pad": the picture in the middle of a square of the mean colour (122, 116, 104), then resized.
    - "anyres", with a `plan` of `data.slicing.llava_next`: the picture resized to a square, its aspect ignored, then its tiles:
      resized within the plan's resolution, on black.

    **Raises** ValueError for another aspect, a plan without "anyres" and the other way round.
    """
    _check(aspect, plan)
    image = image.convert("RGB")
    if plan is not None:
        canvas = Image.new("RGB", _canvas(plan, size))
        canvas.paste(image.resize(plan.resized, _BICUBIC), plan.offset)
        return np.stack([np.asarray(v) for v in (image.resize((size, size), _BICUBIC), *_cut(canvas, plan))])
    if aspect == "pad":
        side, (left, top) = max(image.size), _offset(image.size)
        square = Image.new("RGB", (side, side), _MEAN)
        square.paste(image, (left, top))
        return np.stack([np.asarray(square.resize((size, size), _BICUBIC))])
    width, height = _shortest(image.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), _BICUBIC)
    return np.stack([np.asarray(resized.crop((left, top, left + size, top + size)))])


def maps(width: int, height: int, aspect: str, size: int, plan: Plan | None = None) -> NDArray[np.float64]:
    """`[N, 4]`: a point (x, y) of the picture is at (a x + b, c y + d) of the view, for (a, b, c, d) of each view."""
    _check(aspect, plan)
    if plan is not None:
        a, c = plan.resized[0] / width, plan.resized[1] / height
        tiles = [(a, plan.offset[0] - x, c, plan.offset[1] - y) for x, y, _, _ in plan.boxes]
        return np.array([(size / width, 0, size / height, 0), *tiles])
    if aspect == "pad":
        scale, (left, top) = size / max(width, height), _offset((width, height))
        return np.array([(scale, scale * left, scale, scale * top)])
    w, h = _shortest((width, height), size)
    return np.array([(w / width, -((w - size) // 2), h / height, -((h - size) // 2))], dtype=np.float64)


def plan_of(
    width: int,
    height: int,
    pinpoints: tuple[tuple[int, int], ...],
    size: int,
    patch: int,
    rounding: str = "llava",
) -> Plan:
    """`data.slicing.llava_next` of one picture."""
    plan = llava_next(width, height, pinpoints, size, patch=patch, rounding=rounding)
    assert isinstance(plan, Plan)
    return plan


def _check(aspect: str, plan: Plan | None) -> None:
    if aspect not in ASPECTS:
        raise ValueError(f"aspect: got {aspect!r}, expected one of {', '.join(map(repr, ASPECTS))}")
    if (aspect == "anyres") != (plan is not None):
        raise ValueError(f"plan: got {plan and plan.grid} for {aspect!r}, expected one with 'anyres' alone")


def _canvas(plan: Plan, size: int) -> tuple[int, int]:
    return plan.grid[0] * size, plan.grid[1] * size


def _cut(canvas: Image.Image, plan: Plan) -> list[Image.Image]:
    return [canvas.crop(box) for box in plan.boxes]


def _offset(size: tuple[int, int]) -> tuple[int, int]:
    """Where a picture is laid on a square of its longer side."""
    side = max(size)
    return (side - size[0]) // 2, (side - size[1]) // 2


def _shortest(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size whose shorter side is `side`, the longer one rounded down."""
    shorter = min(size)
    return int(side * size[0] / shorter), int(side * size[1] / shorter)
