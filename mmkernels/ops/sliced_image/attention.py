"""Attention inside packed slices: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import reference
from mmkernels.ops.sliced_image.slices import check_offsets, slice_offsets
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

_INPUTS = "Tensor q, Tensor k, Tensor v"


def _fake_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((h, t), dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _check_forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> None:
    check_offsets(offsets, q.shape[0])


FORWARD = Op(
    f"slice_attention({_INPUTS}, Tensor offsets, float scale) -> (Tensor out, Tensor lse)",
    reference.attend,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    f"slice_attention_backward(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, Tensor offsets, float scale) -> "
    "(Tensor dq, Tensor dk, Tensor dv)",
    reference.attend_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    return *BACKWARD(dout, *ctx.saved_tensors, ctx.scale), None, None


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def slice_attention(
    q: Tensor, k: Tensor, v: Tensor, slices: Tensor, *, prefix: int = 0, scale: float | None = None
) -> Tensor:
    """Exact attention of packed slices: every row sees the rows of its own slice, as if the slice were alone.

    `out[t] = softmax(scale q[t] k^T) v` over the rows of t's slice.

    **Shapes** q `[T, H, D]`, k and v `[T, G, D]`, G divides H; slices: `slice_hw [S, 2]`, with `prefix` rows (a class token)
    before each slice's patches, or the offsets `[S + 1]` that `slice_offsets` made of it, once for all layers. Returns out
    like q. **Dtypes** float32, bfloat16, float16, float64; slice_hw int64, offsets int32. Sums in float32. Under autocast q,
    k, v take its dtype. **Gradient** q, k, v; deterministic; once differentiable.
    **Edge** compiled kernels give each slice the same bits whatever its neighbours hold, NaN included; an empty slice costs
    nothing; off the CPU the host reads nothing.
    **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for slices that are not T rows together;
    TypeError for dtypes and devices.
    **Source** NaViT (arXiv 2307.06304); FlashAttention-2 (arXiv 2307.08691). **Speed** `mmkernels bench --op sliced_image`.
    """
    q, k, v = _check.autocast(q, k, v)  # type: ignore[assignment]
    size = _check.shapes(q=(q, "T H D"), k=(k, "T G D"), v=(v, "T G D"))
    if size["G"] == 0 or size["H"] % size["G"]:
        raise ValueError(f"k: got {size['G']} heads, expected a divisor of q's {size['H']} heads")
    if (
        not isinstance(slices, Tensor)
        or slices.dim() not in (1, 2)
        or slices.shape[0] == 0 == slices.dim() - 1
    ):
        got = tuple(slices.shape) if isinstance(slices, Tensor) else type(slices).__name__
        raise ValueError(f"slices: got {got}, expected slice_hw [S, 2] or offsets [S + 1]")
    if slices.dim() == 2:
        slices = slice_offsets(slices, prefix)
    elif prefix:
        raise ValueError(f"prefix: got {prefix} beside offsets, expected 0: they count every row")
    _check.dtypes(_check.FLOATS, q=q, k=k, v=v)
    _check.dtypes((torch.int32,), slices=slices)
    _check.devices(q=q, k=k, v=v, slices=slices)
    return FORWARD(q, k, v, slices, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]
