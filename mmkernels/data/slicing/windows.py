"""Rules without a choice: Monkey's windows on a fixed canvas, and Fuyu's patches of the picture as it is."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike

from mmkernels.data.slicing.plan import Ints, Pair, Plan, Plans, cells, columns, pair, positive, scalar, sizes


def _in_order(plan: Plan) -> Ints:
    return np.arange(plan.tokens)


def monkey(
    width: ArrayLike,
    height: ArrayLike,
    canvas: int | Pair = 896,
    window: int = 448,
    *,
    patch: int = 14,
    tokens_per_view: int = 256,
) -> Plan | Plans:
    """Plans Monkey's windows: the picture squashed to the canvas, cut into windows row by row, the whole of it last.

    `tokens = tokens_per_view (n + 1)` for n windows, without separators.

    **Shapes** two numbers give a `Plan`, two arrays `[B]` give `Plans`. `canvas` is one number or (width, height): 896 as
    released, (1344, 896) as in the paper. `features` are the patches of a window; the overview is made from the canvas.
    **Edge** What the windows do not cover is dropped.
    **Raises** ValueError, TypeError: a size below one or no integer; a canvas smaller than a window.
    **Source** arXiv 2311.06607, github.com/Yuliang-Liu/Monkey `visual.py`.
    """
    w, h = sizes(width, height)
    canvas = pair("canvas", canvas)
    positive(window=window, patch=patch, tokens_per_view=tokens_per_view)
    if min(canvas) < window or window < patch:
        raise ValueError(
            f"canvas, window: got {canvas}, {window}, expected canvas >= window >= patch ({patch})"
        )
    cols, rows = canvas[0] // window, canvas[1] // window
    plans = Plans(
        columns(w, h, w),
        columns(cols, rows, w),
        columns(*canvas, w),
        columns(0, 0, w),
        columns(window // patch, window // patch, w),
        np.full(len(w), tokens_per_view * (cols * rows + 1), dtype=np.int64),
        columns(window, window, w),
        columns(window, window, w),
        (),
        functools.partial(cells, width=window, height=window),
        _in_order,
    )
    return scalar(width, height, plans)


def _rows(plan: Plan) -> Ints:
    cols, rows = plan.grid
    ids = np.full((rows, cols + 1), -1)
    ids[:, :-1] = np.arange(rows * cols).reshape(rows, cols)
    return ids.reshape(-1)


def fuyu(
    width: ArrayLike, height: ArrayLike, canvas: int | Pair = (1920, 1080), *, patch: int = 30
) -> Plan | Plans:
    """Plans Fuyu's and OtterHD's patches: the picture shrunk into the canvas if it is larger, in rows that a newline ends.

    `tokens = rows (cols + 1)`

    **Shapes** two numbers give a `Plan`, two arrays `[B]` give `Plans`. Every box is a patch, the separator is the newline.
    `resized` is the picture; the last patches of a row and a column reach beyond it into padding.
    **Edge** Nothing is enlarged. The last patch of a canvas that is not whole patches is one of padding too.
    **Raises** ValueError, TypeError: a size below one or no integer; a picture so thin that nothing of it would be left.
    **Source** transformers `models/fuyu`, github.com/Luodian/Otter.
    """
    w, h = sizes(width, height)
    canvas = pair("canvas", canvas)
    positive(patch=patch)
    scale = np.minimum(canvas[1] / h, canvas[0] / w)
    large = (w > canvas[0]) | (h > canvas[1])
    nw, nh = (np.where(large, (v * scale).astype(np.int64), v) for v in (w, h))
    if len(w) and min(nw.min(), nh.min()) < 1:
        at = int(np.argmax((nw < 1) | (nh < 1)))
        thin = f"{w[at]} x {h[at]}, which shrinks to {nw[at]} x {nh[at]}"
        raise ValueError(f"width, height: got {thin}, expected a picture that leaves a pixel each way")
    cols, rows = -(-nw // patch), -(-nh // patch)
    plans = Plans(
        columns(w, h, w),
        columns(cols, rows, w),
        columns(nw, nh, w),
        columns(0, 0, w),
        columns(rows, cols, w),
        rows * (cols + 1),
        columns(patch, patch, w),
        columns(0, 0, w),
        ("newline",),
        functools.partial(cells, width=patch, height=patch),
        _rows,
    )
    return scalar(width, height, plans)
