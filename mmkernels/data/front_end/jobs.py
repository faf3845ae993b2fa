"""What a plan asks for, as resizes onto canvases: the table that every implementation of the front end reads."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import PIL
from numpy.typing import NDArray

from mmkernels.data.slicing.plan import Box, Pair, Plan

BILINEAR, BICUBIC = 0, 1
PILLOW = int(PIL.__version__.split(".")[0])


def down_first(before: Pair, after: Pair) -> int:
    """Whether Pillow resizes down before across: from version 13 on, where that drops more than twice as many lines."""
    lines = before[1] - after[1]
    return int(PILLOW >= 13 and lines > max(0, 2 * (before[0] - after[0])))


@dataclass(frozen=True)
class Job:
    """One resize of one picture, and where its pixels go: onto a canvas of columns x rows views, each cut into patches.

    The order of the fields is that of csrc/host/front_end.h. `real` resizes without rounding to bytes; `last` puts channels
    innermost; `whole` is the size of a second view of the whole canvas, by torch's bicubic of four taps.
    """

    image: int
    x0: int
    y0: int
    x1: int
    y1: int
    width: int
    height: int
    filter: int
    real: int
    left: int
    top: int
    fill: int
    columns: int
    rows: int
    view_w: int
    view_h: int
    patch: int
    last: int
    first: int = 0
    whole_w: int = 0
    whole_h: int = 0
    whole_first: int = 0
    down_first: int = 0

    @property
    def per_view(self) -> int:
        return (self.view_w // self.patch) * (self.view_h // self.patch)

    @property
    def canvas(self) -> Pair:
        """A picture may reach beyond the views; what they do not cover only the view of the whole shows."""
        return (
            max(self.columns * self.view_w, self.left + self.width),
            max(self.rows * self.view_h, self.top + self.height),
        )

    def placed(self, first: int) -> tuple[Job, list[Pair]]:
        """The job at its row of the output, and the (rows, columns) of patches of its views, in order."""
        views = [(self.view_h // self.patch, self.view_w // self.patch)] * (self.columns * self.rows)
        whole = first + len(views) * self.per_view
        if self.whole_w:
            views.append((self.whole_h // self.patch, self.whole_w // self.patch))
        order = down_first((self.x1 - self.x0, self.y1 - self.y0), (self.width, self.height))
        moved = {
            **vars(self),
            "first": first,
            "whole_first": whole if self.whole_w else 0,
            "down_first": order,
        }
        return Job(**moved), views


FIELDS = tuple(field.name for field in fields(Job))


def table(jobs: list[Job]) -> NDArray[np.int64]:
    """int64 `[J, fields]`."""
    return np.array([[getattr(job, name) for name in FIELDS] for job in jobs], dtype=np.int64).reshape(
        len(jobs), len(FIELDS)
    )


def _one(image: int, box: Box, size: Pair, patch: int, *, filter: int = BICUBIC, real: int = 0) -> Job:
    """A view of a box of the picture, squashed to its size."""
    return Job(image, *box, *size, filter, real, 0, 0, 0, 1, 1, *size, patch, 0)


def _tiles(image: int, plan: Plan, patch: int, whole: Pair = (0, 0)) -> Job:
    assert plan.slice_size is not None
    box = (0, 0, *plan.size)
    return Job(
        image, *box, *plan.resized, BICUBIC, 0, *plan.offset, 0, *plan.grid, *plan.slice_size, patch, 0,
        0, *whole,
    )  # fmt: skip


def tiled(image: int, plan: Plan, patch: int) -> list[Job]:
    """LLaVA-NeXT and SliME: the squashed picture if it is wanted, then the tiles of the padded one."""
    tiles = [_tiles(image, plan, patch)]
    if plan.overview_size is None:
        return tiles
    return [_one(image, (0, 0, *plan.size), plan.overview_size, patch), *tiles]


def original(image: int, plan: Plan, patch: int) -> list[Job]:
    """LLaVA-UHD as first released: each box by itself, bilinear and without rounding, the whole picture last."""
    how = {"filter": BILINEAR, "real": 1}
    assert plan.slice_size is not None
    jobs = [_one(image, box, plan.slice_size, patch, **how) for box in plan.boxes]
    if plan.overview_size is not None:
        jobs.append(_one(image, (0, 0, *plan.size), plan.overview_size, patch, **how))
    return jobs


def eccv(image: int, plan: Plan, patch: int) -> list[Job]:
    """LLaVA-UHD of ECCV: the slices of one resized picture, the whole picture last."""
    assert plan.overview_size is not None
    whole = _one(image, (0, 0, *plan.size), plan.overview_size, patch)
    return [whole] if plan.slice_size is None else [_tiles(image, plan, patch), whole]


def windows(image: int, plan: Plan, patch: int) -> list[Job]:
    """Monkey: the windows of the canvas, and the canvas itself at the size of one."""
    assert plan.overview_size is not None
    return [_tiles(image, plan, patch, plan.overview_size)]


def patches(image: int, plan: Plan, patch: int) -> list[Job]:
    """Fuyu: the picture in the corner of its canvas, around it the value 1 of 255; channels innermost."""
    size = (plan.grid[0] * patch, plan.grid[1] * patch)
    return [Job(image, 0, 0, *plan.size, *plan.resized, BILINEAR, 0, 0, 0, 1, 1, 1, *size, patch, 1)]
