"""The patch embedding of packed slices: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import embed
from mmkernels.ops.sliced_image.interpolation import MODES
from mmkernels.ops.sliced_image.slices import check_slices
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

_INPUTS = "Tensor patches, Tensor weight, Tensor? bias, Tensor? positions, Tensor? prefix, "
_RULE = "Tensor slice_hw, int[] grid, str mode, bool align_corners, bool antialias, float? offset"


def _fake_forward(patches: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    prefix, slice_hw = rest[2], rest[3]
    more = 0 if prefix is None else prefix.shape[0] * slice_hw.shape[0]
    return patches.new_empty(patches.shape[0] + more, weight.shape[0])


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:5], rest[-1]
    return tuple(
        t.new_empty(t.shape) if need and t is not None else inputs[0].new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _check_forward(patches: Tensor, *rest: Any) -> None:
    check_slices(rest[4], patches.shape[0])


FORWARD = Op(
    f"slice_patch_embed({_INPUTS}{_RULE}) -> Tensor", embed.forward, fake=_fake_forward, check=_check_forward
)
BACKWARD = Op(
    f"slice_patch_embed_backward(Tensor dout, {_INPUTS}{_RULE}, bool[] needs) -> "
    "(Tensor dpatches, Tensor dweight, Tensor dbias, Tensor dpositions, Tensor dprefix)",
    embed.backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, slice_hw, grid, mode, align, antialias, offset = inputs
    ctx.rule = (list(grid), mode, align, antialias, offset)
    ctx.save_for_backward(*tensors, slice_hw)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    found = BACKWARD(dout, *ctx.saved_tensors, *ctx.rule, needs)
    grads = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return *grads, *(None,) * 6


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def slice_patch_embed(
    patches: Tensor,
    weight: Tensor,
    slice_hw: Tensor,
    *,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    mode: str = "bicubic",
    align_corners: bool = False,
    antialias: bool = False,
    offset: float | None = None,
) -> Tensor:
    """Patches of packed slices become tokens in one product; the position table stretches to each slice in its epilogue.

    `out[p] = W patch[p] + b + interpolate(positions, to p's slice)[y, x]`, and before each slice's patches its prefix rows.

    **Shapes** patches `[P, K]`, slice after slice, each row by row; weight `[C, K]`, bias `[C]`; slice_hw `[S, 2]`, (height,
    width) in patches; positions `[G, C]` of a `grid = (rows, columns)`, the square of G cells unless given, learned or a fixed
    (sin-cos) table; prefix `[Q, C]` is put before every slice as it is (a class token with its position added). Returns
    `[P + S Q, C]`. mode "bicubic" (a = -0.75; -0.5 when `antialias`) or "bilinear"; `align_corners` and `antialias` as
    torch's interpolate has them; `offset=o` for towers that interpolate by `scale_factor=(n + o) / g`, as DINO does with 0.1.
    **Dtypes** float32, bfloat16, float16, float64, one for patches, weight, bias; positions and prefix have their own. The sum
    is rounded once. slice_hw int64. Under autocast patches, weight and bias take its dtype.
    **Gradient** patches, weight, bias, positions, prefix; deterministic; once differentiable.
    **Edge** a slice of the table's size reads it as it is; a slice of no patches has its prefix alone; off the CPU the host
    reads nothing. **Raises** ValueError for shapes and names, and on CPU (elsewhere with MMKERNELS_CHECK=1) for slices that
    are not P patches together; TypeError for dtypes and devices.
    **Source** CLIP (arXiv 2103.00020); LLaVA-UHD (arXiv 2403.11703) 3.2; NaViT (arXiv 2307.06304).
    **Speed** `mmkernels bench --op slice_patch_embed`.
    """
    patches, weight, bias = _check.autocast(patches, weight, bias)  # type: ignore[assignment]
    size = _check.shapes(
        patches=(patches, "P K"), weight=(weight, "C K"), slice_hw=(slice_hw, "S 2"), bias=(bias, "C"),
        positions=(positions, "G C"), prefix=(prefix, "Q C"),
    )  # fmt: skip
    _check.choice("mode", mode, MODES)
    _check.dtypes(_check.FLOATS, patches=patches, weight=weight, bias=bias)
    for name, value in {"positions": positions, "prefix": prefix}.items():
        _check.dtypes(_check.FLOATS, **{name: value})
    _check.dtypes((torch.int64,), slice_hw=slice_hw)
    _check.devices(
        patches=patches, weight=weight, slice_hw=slice_hw, bias=bias, positions=positions, prefix=prefix
    )
    if offset is not None and (align_corners or antialias):
        raise ValueError(f"offset: got {offset} beside align_corners or antialias, expected None there")
    shape = _grid(size.get("G", 0), grid) if positions is not None else [0, 0]
    return FORWARD(
        patches, weight, bias, positions, prefix, slice_hw, shape, mode, align_corners, antialias, offset
    )


def _grid(cells: int, grid: tuple[int, int] | None) -> list[int]:
    side = round(cells**0.5)
    shape = [side, side] if grid is None else [int(n) for n in grid]
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1 or shape[0] * shape[1] != cells:
        wanted = "a square number of cells" if grid is None else f"the {grid} cells of grid"
        raise ValueError(f"positions: got {cells} rows, expected {wanted}")
    return shape
