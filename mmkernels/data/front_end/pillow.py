"""The front end in Pillow and numpy, job by job: the law that the compiled one is held to, and what serves without it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from mmkernels.data.front_end.jobs import BICUBIC, Job

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
Pixels = NDArray[np.uint8]


def run(
    images: list[Pixels], jobs: list[Job], table: NDArray, affine: NDArray[np.float64], out: torch.Tensor
) -> None:
    """Fills the rows of `out`; `table` `[3, 256]` is what a byte becomes, in the bits of out's dtype."""
    bits = torch.from_numpy(table).view(out.dtype)
    for job in jobs:
        box = images[job.image][job.y0 : job.y1, job.x0 : job.x1]
        if job.real:
            _put(out, job, real(box, job), affine)
            continue
        canvas = torch.from_numpy(paste(box, job))
        views = (job.columns * job.view_w, job.rows * job.view_h)
        of_byte = bits.T[canvas[: views[1], : views[0]].long(), torch.arange(3)]
        _write(out, job.first, of_byte, job, (job.view_w, job.view_h), job.columns)
        if job.whole_w:
            value = canvas.permute(2, 0, 1)[None].to(torch.float64)
            size = (job.whole_h, job.whole_w)
            value = F.interpolate(value, size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
            _put(out, job, value, affine, whole=True)


def paste(box: Pixels, job: Job) -> Pixels:
    """The resized box on its canvas: uint8 `[H, W, 3]`."""
    canvas = np.full((job.canvas[1], job.canvas[0], 3), job.fill, dtype=np.uint8)
    resized = Image.fromarray(box).resize((job.width, job.height), FILTERS[job.filter])
    canvas[job.top : job.top + job.height, job.left : job.left + job.width] = np.asarray(resized)
    return canvas


def real(box: Pixels, job: Job) -> torch.Tensor:
    """The resized box without rounding, 0 to 255: float64 `[H, W, 3]`."""
    value = torch.from_numpy(np.ascontiguousarray(box)).permute(2, 0, 1)[None].to(torch.float64)
    mode = "bicubic" if job.filter == BICUBIC else "bilinear"
    size = (job.height, job.width)
    value = F.interpolate(value, size, mode=mode, align_corners=False, antialias=True)
    return value[0].permute(1, 2, 0)


def _put(
    out: torch.Tensor, job: Job, value: torch.Tensor, affine: NDArray[np.float64], whole: bool = False
) -> None:
    scale, shift = torch.from_numpy(affine)
    size = (job.whole_w, job.whole_h) if whole else (job.view_w, job.view_h)
    made = (value * scale + shift).to(torch.float32).to(out.dtype)
    _write(out, job.whole_first if whole else job.first, made, job, size, 1 if whole else job.columns)


def _write(
    out: torch.Tensor, first: int, canvas: torch.Tensor, job: Job, view: tuple[int, int], columns: int
) -> None:
    """Cuts a canvas `[H, W, 3]` into views row by row, and each into patches row by row; a remainder is dropped."""
    p, rows = job.patch, canvas.shape[0] // view[1]
    down, across = view[1] // p, view[0] // p
    tiles = canvas.reshape(rows, view[1], columns, view[0], 3)[:, : down * p, :, : across * p]
    tiles = tiles.reshape(rows, down, p, columns, across, p, 3)
    order = (0, 3, 1, 4, 2, 5, 6) if job.last else (0, 3, 1, 4, 6, 2, 5)
    made = tiles.permute(order).reshape(-1, 3 * p * p)
    out[first : first + len(made)] = made
