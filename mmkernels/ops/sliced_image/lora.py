"""Per-window LoRA: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op


def _fake_forward(x: Tensor, base: Tensor, a: Tensor, b: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return base.new_empty(base.shape), x.new_empty((x.shape[0], a.shape[1]), dtype=wide)


def _fake_backward(dout: Tensor, x: Tensor, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, a, b), rest[-1], strict=True))


def _check_forward(x: Tensor, base: Tensor, a: Tensor, b: Tensor, segment: Tensor) -> None:
    wrong = (segment < -1) | (segment >= a.shape[0])
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"segment: row {row} has window {int(segment[row])}, expected 0 to {a.shape[0] - 1}, or -1 for none"
        )


FORWARD = Op(
    "segment_lora(Tensor x, Tensor base, Tensor a, Tensor b, Tensor segment) -> (Tensor out, Tensor t)",
    reference.lora,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    "segment_lora_backward(Tensor dout, Tensor x, Tensor a, Tensor b, Tensor segment, Tensor t, bool[] needs) -> "
    "(Tensor dx, Tensor da, Tensor db)",
    reference.lora_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, a, b, segment = inputs
    ctx.save_for_backward(x, a, b, segment, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    dx, da, db = None, None, None
    if any(needs):
        found = BACKWARD(dout, *ctx.saved_tensors, needs)
        dx, da, db = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dx, dout if ctx.needs_input_grad[1] else None, da, db, None


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def segment_lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, segment: Tensor) -> Tensor:
    """The low-rank update of each row's own window, added to a product that all windows share.

    `out[r] = base[r] + b[w] (a[w] x[r])`, w = segment[r]; `out[r] = base[r]` where w = -1.

    **Shapes** x `[R, C]`; base `[R, N]`, the rows that the update is added to; a `[W, K, C]`, b `[W, N, K]`; segment `[R]`,
    the window of each row, -1 for none. Returns `[R, N]`.
    **Dtypes** float32, bfloat16, float16, float64, one for x, a, b; base x's or float32, and out has base's; segment int32 or
    int64. Sums in float32, the K numbers between included. Under autocast x, a, b take its dtype.
    **Gradient** x, base, a, b; deterministic; once differentiable; nothing is computed for an input that asks for none.
    **Edge** a window without rows costs nothing and its gradients are exactly 0; rows without a window keep base's bits.
    **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for a window below -1 or past the last;
    TypeError for dtypes and devices. Kernels take such a row as one without a window.
    **Source** Monkey (arXiv 2311.06607); LoRA (arXiv 2106.09685); Punica (arXiv 2310.18547).
    **Speed** `mmkernels bench --op segment_lora`.
    """
    x, a, b = _check.autocast(x, a, b)  # type: ignore[assignment]
    _check.shapes(x=(x, "R C"), base=(base, "R N"), a=(a, "W K C"), b=(b, "W N K"), segment=(segment, "R"))
    _check.dtypes(_check.FLOATS, x=x, a=a, b=b)
    _check.dtypes((x.dtype, torch.float32), base=base)
    _check.dtypes((torch.int32, torch.int64), segment=segment)
    _check.devices(x=x, base=base, a=a, b=b, segment=segment)
    return FORWARD(x, base, a, b, segment)[0]
