"""The front end on the GPU: bytes of pictures in, rows of patches out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from mmkernels.data.front_end import weights
from mmkernels.data.front_end.jobs import Job
from mmkernels.data.front_end.triton import kernels
from mmkernels.data.front_end.weights import Axis

BLOCK, COLUMNS = 256, 13
SQUARE = 16  # the side of the squares that a canvas is drawn in: a block each


def run(images: list[NDArray[np.uint8]], jobs: list[Job], table: Tensor, affine: Tensor, out: Tensor) -> None:
    """Fills the rows of `out` on its device; `table` `[3, 256]` and `affine` `[2, 3]` as of `normalisation`."""
    sizes = [image.size for image in images]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    joined = np.concatenate([image.reshape(-1) for image in images] or [np.zeros(0, np.uint8)])
    pixels = torch.from_numpy(joined).to(out.device)
    strides = [image.shape[1] * 3 for image in images]
    for real in (0, 1):
        chosen = [job for job in jobs if job.real == real]
        places = [starts[job.image] + job.y0 * strides[job.image] + 3 * job.x0 for job in chosen]
        steps = [strides[job.image] for job in chosen]
        _launch(pixels, places, steps, chosen, affine if real else table, out, real=bool(real))
    for job in jobs:
        if job.whole_w:
            _whole(pixels, int(starts[job.image]), strides[job.image], job, affine, out)


def _whole(pixels: Tensor, start: int, stride: int, job: Job, affine: Tensor, out: Tensor) -> None:
    """The view of a whole canvas: the canvas in bytes first, then by four taps."""
    w, h = job.canvas
    down, across = triton.cdiv(h, SQUARE), triton.cdiv(w, SQUARE)
    around = {"columns": 1, "rows": 1, "whole_w": 0, "whole_h": 0}
    view = {"view_w": across * SQUARE, "view_h": down * SQUARE, "patch": SQUARE, "last": 1, "first": 0}
    drawn = torch.empty(down * across, 3 * SQUARE**2, dtype=torch.float32, device=out.device)
    same = torch.arange(256.0, device=out.device).repeat(3, 1)
    place = start + job.y0 * stride + 3 * job.x0
    _launch(pixels, [place], [stride], [Job(**{**vars(job), **around, **view})], same, drawn, real=False)
    squares = drawn.to(torch.uint8).reshape(down, across, SQUARE, SQUARE, 3).transpose(1, 2)
    canvas = squares.reshape(down * SQUARE, across * SQUARE, 3)[:h, :w].contiguous()
    size = {
        "x0": 0,
        "y0": 0,
        "x1": w,
        "y1": h,
        "width": job.whole_w,
        "height": job.whole_h,
        "left": 0,
        "top": 0,
    }
    view = {"view_w": job.whole_w, "view_h": job.whole_h, "first": job.whole_first, "real": 1}
    whole = Job(**{**vars(job), **around, **size, **view, "down_first": 0})
    _launch(canvas, [0], [3 * w], [whole], affine, out, real=True, axis=lambda a, b, _: weights.four(a, b))


def _launch(
    pixels: Tensor, places: list[int], strides: list[int], jobs: list[Job], table: Tensor, out: Tensor, *,
    real: bool, axis: Callable[[int, int, int], Axis] = weights.widened,
) -> None:  # fmt: skip
    if not jobs:
        return
    described, first, count, k, rows, targets = [], [], [], [], [], []
    taps, outputs = 0, 0
    for at, job in enumerate(jobs):
        line = [places[at], strides[at], 3, job.width, job.height, job.fill]
        for before, after in ((job.x1 - job.x0, job.width), (job.y1 - job.y0, job.height)):
            one = axis(before, after, job.filter)
            k.append((one.weights.astype(np.float32) if real else one.fixed()).reshape(-1))
            line += [outputs, taps, one.weights.shape[1]]
            first.append(one.first)
            count.append(one.count)
            outputs, taps = outputs + after, taps + k[-1].size
        described.append([*line, job.down_first])
        rows.append(_rows(job, at))
        targets.append((job.first, len(rows[-1])))
    device, p = out.device, jobs[0].patch
    to = [torch.from_numpy(np.concatenate(v)).to(device) for v in (rows, first, count, k)]
    lines = torch.tensor(described, dtype=torch.int64, device=device)
    n = len(to[0])
    begin = targets[0][0]
    together = all(a + m == b for (a, m), (b, _) in itertools.pairwise(targets))
    made = out[begin : begin + n] if together else out.new_empty(n, out.shape[1])
    with torch.cuda.device_of(out):
        kernels.patch_rows[(n, triton.cdiv(p * p, BLOCK))](
            pixels, to[0], lines, *to[1:], table.contiguous(), made,
            P=p, LAST=bool(jobs[0].last), REAL=real, JOB=COLUMNS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    if not together:
        for (a, m), part in zip(targets, made.split([m for _, m in targets]), strict=True):
            out[a : a + m] = part


def _rows(job: Job, at: int) -> NDArray[np.int32]:
    """int32 `[patches, 3]`: the job, and where each patch begins in the resized picture (y, x)."""
    p = job.patch
    y, x = (np.arange(side // p) * p for side in (job.view_h, job.view_w))
    tops, lefts = np.arange(job.rows) * job.view_h, np.arange(job.columns) * job.view_w
    grid = np.broadcast_arrays(tops[:, None, None, None] + y[:, None], lefts[:, None, None] + x)
    both = [side.reshape(-1) - shift for side, shift in zip(grid, (job.top, job.left), strict=True)]
    return np.stack([np.full(len(both[0]), at), *both], 1).astype(np.int32)
