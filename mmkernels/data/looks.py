"""What a model that slices is shown of a picture of any size: its slices, and the whole of it, as a plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkernels.data import images, slicing
from mmkernels.data.slicing import Plan

RULES = ("llava_uhd", "monkey", "fuyu", "slime")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Looked:
    """A picture as its plan has it. views `[3, h, w]`, in the order in which they are encoded; boxes say where each lies in the
    picture (x0, y0, x1, y1), in its pixels. canvas is the resized and padded picture `[3, H, W]`.
    """

    plan: Plan
    views: list[Tensor]
    boxes: list[Box]
    canvas: Tensor


def look(image: Image.Image, rule: str, options: Mapping[str, Any], *, pixels: str = "clip") -> Looked:
    """Plans a picture by `data.slicing`'s `rule` with its `options` and cuts it.

    Pillow resizes: bicubic, and bilinear where a slice is cut before it is resized, and for Fuyu. What no pixel covers is
    black.
    `pixels` "clip" are normalised, "unit" between 0 and 1, "raw" 0 to 255.
    **Raises** ValueError for other rules and kinds of pixels.
    """
    if rule not in RULES or pixels not in ("clip", "unit", "raw"):
        raise ValueError(
            f"rule, pixels: got {rule!r}, {pixels!r}, expected one of {', '.join(RULES)}; clip, unit or raw"
        )
    image = image.convert("RGB")
    plan: Any = getattr(slicing, rule)(*image.size, **options)
    early = options.get("release", "") == "original" or rule == "fuyu"
    smooth = Image.Resampling.BILINEAR if early else Image.Resampling.BICUBIC
    canvas = _canvas(image, plan, smooth) if rule != "fuyu" else image.resize(plan.resized, smooth)
    cut = []
    if rule != "fuyu":
        cut = [canvas.crop(box).resize(plan.slice_size, smooth) for box in plan.boxes]
    whole = [] if plan.overview_size is None else [image.resize(plan.overview_size, smooth)]
    parts = whole + cut if rule == "slime" else cut + whole
    boxes = [_in_picture(box, plan) for box in plan.boxes] if cut else []
    full = [(0.0, 0.0, float(image.width), float(image.height))] * len(whole)
    return Looked(
        plan, [_tensor(part, pixels) for part in parts], full + boxes if rule == "slime" else boxes + full,
        _tensor(canvas, pixels),
    )  # fmt: skip


def _canvas(image: Image.Image, plan: Plan, smooth: Image.Resampling) -> Image.Image:
    resized = image.resize(plan.resized, smooth)
    right, below = (max((box[at] for box in plan.boxes), default=plan.resized[at - 2]) for at in (2, 3))
    if (right, below) == plan.resized and plan.offset == (0, 0):
        return resized
    canvas = Image.new("RGB", (right, below))
    canvas.paste(resized, plan.offset)
    return canvas


def _in_picture(box: tuple[int, int, int, int], plan: Plan) -> Box:
    scale = [plan.size[n] / plan.resized[n] for n in (0, 1)]
    x0, y0, x1, y1 = ((side - plan.offset[n % 2]) * scale[n % 2] for n, side in enumerate(box))
    return x0, y0, x1, y1


def _tensor(image: Image.Image, pixels: str) -> Tensor:
    array = np.array(image)  # Pillow's own memory is read-only
    if pixels == "clip":
        return images.normalise(array)
    raw = torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, 0).float()
    return raw if pixels == "raw" else raw / 255
