"""Region pooling on CPU: each slice by two products, one for each axis of its map."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import pooling
from mmkernels.ops.sliced_image.composed import present
from mmkernels.ops.sliced_image.regions import KEYS, axis_weights, pool_size


def _axis(size: int, bins: int, g: int, dtype: torch.dtype) -> Tensor:
    """What the bins of one axis read: [g, bins, size]."""
    cells = torch.arange(size)
    sizes, counts, bin_of = (
        torch.full((size,), size),
        torch.full((size,), bins),
        torch.arange(bins).expand(size, -1),
    )
    return axis_weights(cells, sizes, counts, bin_of, g, dtype).permute(1, 2, 0)


def _plans(slice_hw: Tensor, g: int, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """Of every slice that has rows: its number, first row, rows, and the two axes' matrices."""
    found, start, known = [], 0, {}
    for s, (h, w) in enumerate(slice_hw.tolist()):
        if h * w:
            if (h, w) not in known:
                ow, oh = pool_size(w / h)
                known[h, w] = _axis(h, oh, g, dtype), _axis(w, ow, g, dtype)
            found.append((s, start, h * w, *known[h, w]))
        start += h * w
    return found


def forward(x: Tensor, slice_hw: Tensor, g: int) -> Tensor:
    """The operator region_pool."""
    wide, c = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    out = torch.empty((len(slice_hw), g, g, KEYS, c), dtype=x.dtype)
    done = -1
    for s, start, area, rows, columns in _plans(slice_hw, g, x.dtype):
        out[done + 1 : s] = 0
        (_, oh, h), (_, ow, w) = rows.shape, columns.shape
        tall = rows.flatten(0, 1) @ x[start : start + area].to(wide).reshape(h, w * c)
        keys = torch.matmul(columns.flatten(0, 1), tall.view(g * oh, w, c)).view(g, oh, g, ow, c)
        out[s, :, :, : oh * ow].unflatten(2, (oh, ow)).copy_(keys.transpose(1, 2))
        out[s, :, :, oh * ow :] = 0
        done = s
    out[done + 1 :] = 0
    return out.flatten(1, 2)


def backward(dout: Tensor, x: Tensor, slice_hw: Tensor, g: int) -> Tensor:
    """The operator region_pool_backward."""
    wide, c = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype)
    for s, start, area, rows, columns in _plans(slice_hw, g, x.dtype):
        oh, (_, ow, w) = rows.shape[1], columns.shape
        keys = dout[s].unflatten(0, (g, g))[:, :, : oh * ow].unflatten(2, (oh, ow)).transpose(1, 2).to(wide)
        tall = torch.matmul(columns.flatten(0, 1).t(), keys.reshape(g * oh, g * ow, c))
        dx[start : start + area] = (rows.flatten(0, 1).t() @ tall.view(g * oh, w * c)).view(area, c)
    return dx


pooling.FORWARD.register("cpu", "cpp", forward, present=present)
pooling.BACKWARD.register("cpu", "cpp", backward, present=present)
