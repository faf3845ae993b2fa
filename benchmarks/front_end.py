"""The image front end against the Pillow and torch pipeline that users write, on a hundred photographs of many sizes.

Eleven photographs come with scikit-image and scikit-learn; the hundred are cuts of them at 0.4 to 2 times their size, drawn
from a fixed seed. Both sides begin with decoded pixels and end with packed rows of patches, ten pictures at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.wanted import FRONT_END, Row, Wanted
from mmkernels import _native
from mmkernels.data.front_end import RULES, FrontEnd
from mmkernels.data.slicing import Plan

PICTURES, BATCH = 100, 10
TOLERANCE = (
    1e-3  # torch's float32 weights of an antialiased resize are that far from exact ones, times 1 / std
)
NAMES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "stereo_motorcycle",
)
Pixels = NDArray[np.uint8]


def plan(wanted: Wanted) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    return [
        (f"{FRONT_END} {rule}", lambda r=rule: _row(r, wanted))
        for rule in RULES
        if (not wanted.ops or FRONT_END in wanted.ops)
        and (not wanted.shapes or rule in wanted.shapes)
        and (not wanted.dtypes or "float32" in wanted.dtypes)
        and (not wanted.passes or "fwd" in wanted.passes)
        and wanted.device == "cpu"
        and (not wanted.quick or rule == "llava_next")
    ]


@functools.cache
def photographs(count: int = PICTURES) -> list[Pixels]:
    """Cuts and rescalings of real photographs: sides of about 150 to 2000 pixels."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    whole: list[Pixels] = list(load_sample_images().images)
    for name in NAMES:
        found = getattr(data, name)()
        whole += [found] if isinstance(found, np.ndarray) else list(found[:2])
    rng, cuts = np.random.default_rng(0), []
    for at in range(count):
        picture = whole[at % len(whole)]
        h, w = (int(side * rng.uniform(0.5, 1)) for side in picture.shape[:2])
        y, x = (
            int(rng.integers(0, side - cut + 1)) for side, cut in zip(picture.shape, (h, w), strict=False)
        )
        scale = rng.uniform(0.4, 2) if max(h, w) < 1000 else rng.uniform(0.4, 1)
        size = (max(16, int(w * scale)), max(16, int(h * scale)))
        cuts.append(np.array(Image.fromarray(picture[y : y + h, x : x + w, :3]).resize(size)))
    return cuts


def _views(front: FrontEnd, rule: str, pixels: Pixels) -> list[Tensor]:
    """What a user writes: pictures cut and resized by Pillow (by torch where the rule does not round), as `[3, h, w]`."""
    image, plan = Image.fromarray(pixels), front.plan(pixels.shape[1], pixels.shape[0])
    if rule == "llava_uhd":
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)[None]
        return [
            F.interpolate(tensor[:, :, b:d, a:c], size[::-1], mode="bilinear", antialias=True)[0]
            for (a, b, c, d), size in _parts(plan)
        ]
    resampling = Image.Resampling.BILINEAR if rule == "fuyu" else Image.Resampling.BICUBIC
    resized = image.resize(plan.resized, resampling)
    if rule == "fuyu":
        canvas = Image.new("RGB", (plan.grid[0] * 30, plan.grid[1] * 30), (1, 1, 1))
        canvas.paste(resized)
        return [_normalised(canvas, front)]
    if rule == "monkey":
        whole = _normalised(resized, front)
        tiles = [whole[:, b:d, a:c] for a, b, c, d in plan.boxes]
        return [*tiles, F.interpolate(whole[None], (448, 448), mode="bicubic", align_corners=False)[0]]
    overview = (
        [_normalised(image.resize(plan.overview_size, resampling), front)] if plan.overview_size else []
    )
    if rule == "llava_uhd_eccv":
        return [*(_normalised(resized.crop(box), front) for box in plan.boxes), *overview]
    canvas = Image.new("RGB", (plan.grid[0] * 336, plan.grid[1] * 336))
    canvas.paste(resized, plan.offset)
    return [*overview, *(_normalised(canvas.crop(box), front) for box in plan.boxes)]


def _parts(plan: Plan) -> list[tuple[Any, Any]]:
    parts: list[tuple[Any, Any]] = [(box, plan.slice_size) for box in plan.boxes]
    return parts + ([((0, 0, *plan.size), plan.overview_size)] if plan.overview_size else [])


def _normalised(image: Image.Image, front: FrontEnd) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (front.rule.mean, front.rule.std))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    return pixels.float().div(255).sub(mean).div(std)


def _patches(views: list[Tensor], patch: int, last: bool) -> list[Tensor]:
    order = (1, 2, 3, 4, 0) if last else (1, 2, 0, 3, 4)
    cut = (view.unfold(1, patch, patch).unfold(2, patch, patch).permute(order) for view in views)
    return [view.reshape(-1, 3 * patch * patch) for view in cut]


def _pipeline(front: FrontEnd, rule: str, pool: ThreadPoolExecutor | None, batch: list[Pixels]) -> Tensor:
    def one(pixels: Pixels) -> list[Tensor]:
        return _patches(_views(front, rule, pixels), front.patch, rule == "fuyu")

    found = pool.map(one, batch) if pool else map(one, batch)
    return torch.cat([view for views in found for view in views])


def _row(rule: str, wanted: Wanted) -> Iterator[Row]:
    front, pictures = FrontEnd(rule), photographs()
    batches = [pictures[at : at + BATCH] for at in range(0, PICTURES, BATCH)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        makers: dict[str, Callable[[list[Pixels]], Tensor]] = {
            "ours": lambda batch: front(batch).patches,
            "pillow_torch": functools.partial(_pipeline, front, rule, None),
            "pillow_torch_pool": functools.partial(_pipeline, front, rule, pool),
            "again": lambda batch: front(batch).patches,
        }
        worst = max(float((front(b).patches - makers["pillow_torch"](b)).abs().max()) for b in batches)
        allowed = TOLERANCE if rule in ("llava_uhd", "monkey") else 0.0
        row: Row = {
            "op": FRONT_END, "shape": rule, "dtype": "float32", "headline": rule == "llava_next", "pass": "fwd",
            "backend": "host" if _native.host else "pillow", "correct": worst <= allowed, "worst": "patches",
            "share_of_allowed_error": measure.significant(worst / (allowed or 1), 3),
        }  # fmt: skip
        yield row | (_timed(makers, batches, wanted) if row["correct"] else {})


def _timed(
    makers: dict[str, Callable[[list[Pixels]], Tensor]], batches: list[list[Pixels]], wanted: Wanted
) -> Row:
    """Milliseconds of all the pictures."""

    def all_of(make: Callable[[list[Pixels]], Tensor]) -> Callable[[], Any]:
        return lambda: [make(batch).shape for batch in batches]

    functions = {name: all_of(make) for name, make in makers.items()}
    neighbours = machine.Neighbours()
    times = measure.interleave(functions, measure.cpu_clock, seconds=wanted.seconds, rounds=20)
    others = neighbours.cores()
    peers = [name for name in makers if name not in ("ours", "again")]
    ratios = {name: measure.ratio(times, name, "ours") for name in peers}
    return {
        "ms": measure.spread(times, "ours").rounded(),
        "ratio": {name: measure.significant(found.median) for name, found in ratios.items()},
        "ratio_p20": {name: measure.significant(found.p20) for name, found in ratios.items()},
        "ratio_p80": {name: measure.significant(found.p80) for name, found in ratios.items()},
        "peer_ms": {name: measure.spread(times, name).rounded() for name in peers},
        "itself": measure.ratio(times, "again", "ours").rounded(),
        "absent": {},
        "others_cores": others,
        "loaded": others is not None and others > machine.BUSY,
    }
