"""Region pooling of packed slices: schema, gradient, public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import regions
from mmkernels.ops.sliced_image.slices import check_slices
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op
from mmkernels.primitives.interval_attention import interval_attention


def _fake_forward(x: Tensor, slice_hw: Tensor, g: int) -> Tensor:
    return x.new_empty(slice_hw.shape[0], g * g, regions.KEYS, x.shape[1])


def _check_forward(x: Tensor, slice_hw: Tensor, g: int) -> None:
    check_slices(slice_hw, x.shape[0], "x")


FORWARD = Op(
    "region_pool(Tensor x, Tensor slice_hw, int g) -> Tensor",
    regions.forward,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    "region_pool_backward(Tensor dout, Tensor x, Tensor slice_hw, int g) -> Tensor",
    regions.backward,
    fake=lambda dout, x, slice_hw, g: x.new_empty(x.shape),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slice_hw, ctx.g = inputs
    ctx.save_for_backward(x, slice_hw)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return BACKWARD(dout, *ctx.saved_tensors, ctx.g), None, None


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def region_pool(x: Tensor, slice_hw: Tensor, *, grid: int = 12) -> Tensor:
    """RoIAlign of the `grid x grid` boxes of every packed slice's map, each into the 6 to 12 bins that fit its shape best.

    `out[s, i grid + j, k] = mean of bilinear samples of slice s in bin k of box (i, j)`; `pool_size(width / height)` bins.

    **Shapes** x `[P, C]`, slice after slice, each row by row; slice_hw `[S, 2]`, (height, width) in rows of x. Returns
    `[S, grid^2, 12, C]`: the bins of a box row by row, then zeros. **Dtypes** float32, bfloat16, float16, float64: box edges
    are rounded to it, the rest is computed in float32; slice_hw int64. **Gradient** x, gathered, deterministic; once
    differentiable. **Edge** boxes are at least one cell wide, so those of small maps overlap; samples past the map are 0; a
    slice of no rows pools zeros. **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for slices
    that are not P rows together; TypeError for dtypes and devices.
    **Source** LLaVA-UHD (arXiv 2403.11703), its ECCV release; Mask R-CNN (arXiv 1703.06870).
    **Speed** `mmkernels bench --op region_pool`.
    """
    _check.shapes(x=(x, "P C"), slice_hw=(slice_hw, "S 2"))
    _check.positive(grid=grid)
    _check.dtypes(_check.FLOATS, x=x)
    _check.dtypes((torch.int64,), slice_hw=slice_hw)
    _check.devices(x=x, slice_hw=slice_hw)
    return FORWARD(x, slice_hw, grid)


def region_attention(
    q: Tensor, k: Tensor, v: Tensor, slice_hw: Tensor, *, grid: int = 12, scale: float | None = None
) -> Tensor:
    """Each of `grid^2` queries of a slice attends to the pooled keys of its own box alone.

    `out[s, n] = softmax(scale q[n] region_pool(k)[s, n]^T) region_pool(v)[s, n]` over the slice's 6 to 12 bins.

    **Shapes** q `[grid^2, H, D]`, the same for all slices, or `[S, grid^2, H, D]`; k and v `[P, G, D]`, G divides H; slice_hw
    `[S, 2]`. Returns `[S, grid^2, H, D]`. Pooling is linear: k and v may be projected before it, and a bias added after.
    **Dtypes**, **Edge**, **Raises** as `region_pool`; q, k, v one dtype; under autocast they take its dtype.
    **Gradient** q, k, v; deterministic; once differentiable.
    **Source** LLaVA-UHD (arXiv 2403.11703), its ECCV release. **Speed** `mmkernels bench --op region_pool`.
    """
    q, k, v = _check.autocast(q, k, v)  # type: ignore[assignment]
    if isinstance(q, Tensor) and q.dim() == 3:
        q = q.unsqueeze(0).expand(slice_hw.shape[0], -1, -1, -1)
    size = _check.shapes(
        q=(q, f"S {grid * grid} H D"), k=(k, "P G D"), v=(v, "P G D"), slice_hw=(slice_hw, "S 2")
    )
    keys, values = (
        region_pool(t.flatten(1), slice_hw, grid=grid).view(-1, size["G"], size["D"]) for t in (k, v)
    )
    bins = regions.pool_sizes(slice_hw).prod(1).to(torch.int32)
    lo = torch.arange(0, len(keys), regions.KEYS, dtype=torch.int32, device=q.device)
    hi = lo + bins.repeat_interleave(grid * grid, output_size=lo.shape[0])
    out = interval_attention(q.flatten(0, 1), keys, values, lo, hi, scale=scale)
    return out.view(q.shape)  # type: ignore[union-attr]
