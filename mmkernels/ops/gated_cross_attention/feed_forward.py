"""Flamingo's gated feed-forward: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.gated_cross_attention import reference
from mmkernels.ops.gated_cross_attention.op import NORMS, check_gate, grads_like
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

ACTIVATIONS = ("gelu", "relu", "squared_relu", "swiglu")
_INPUTS = "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w_in, Tensor w_out, Tensor gate, "


def _fake_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, w_in: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    row = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return (x.new_empty(x.shape), w_in.new_empty((x.shape[0], w_in.shape[0])), row, torch.empty_like(row))


def kernel_dtypes(x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, w_in: Tensor, *rest: Any) -> str:
    if w_in.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {w_in.dtype} runs on the reference"
    return (
        ""
        if x.dtype in (w_in.dtype, torch.float32)
        else f"x in {x.dtype} beside {w_in.dtype} runs on the reference"
    )


FORWARD = Op(
    f"gated_feed_forward({_INPUTS}str activation, float eps, bool rms) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    reference.feed_forward,
    fake=_fake_forward,
)
BACKWARD = Op(
    f"gated_feed_forward_backward(Tensor dy, {_INPUTS}Tensor h, Tensor mean, Tensor rstd, "
    "str activation, float eps, bool rms) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dw_in, "
    "Tensor dw_out, Tensor dgate)",
    reference.feed_forward_backward,
    fake=lambda dy, *inputs: grads_like(*inputs[:6]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.eps, ctx.rms = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    dx, dnw, dnb, dw_in, dw_out, dgate = BACKWARD(dy, *saved, ctx.activation, ctx.eps, ctx.rms)
    return (dx, dnw, None if saved[2] is None else dnb, dw_in, dw_out, dgate, None, None, None)


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def gated_feed_forward(
    x: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor,
    activation: str = "gelu",
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """The feed-forward half of a gated block, as one op.

    `y = x + tanh(gate) * (act(norm(x) w_in^T) w_out^T)`; "gelu" is the exact erf form, "swiglu" reads the rows of w_in as
    [gate; up] and computes `silu(gate) * up`.

    **Shapes** x `[..., C]`; w_in `[N, C]` (`[2N, C]` for "swiglu"); w_out `[C, N]`; norm_weight, norm_bias `[C]`;
    gate `[1]` or `[C]`.
    **Dtypes** as `gated_cross_attention`. **Gradient** every tensor; deterministic; once differentiable.
    **Edge** gate 0 returns x, and still gives the gate its gradient.
    **Raises** ValueError for shapes and names, TypeError for dtypes and devices.
    **Source** Flamingo (arXiv 2204.14198) figure 4; Idefics for "swiglu". **Speed** `mmkernels bench --op gated_feed_forward`.
    """
    w_in, w_out = _check.autocast(w_in, w_out)  # type: ignore[assignment]
    _check.choice("norm", norm, NORMS)
    _check.choice("activation", activation, ACTIVATIONS)
    rows = x.reshape(-1, x.shape[-1])
    size = _check.shapes(
        x=(rows, "R C"), norm_weight=(norm_weight, "C"), norm_bias=(norm_bias, "C"), w_in=(w_in, "W C"), w_out=(w_out, "C N")
    )  # fmt: skip
    if size["W"] != size["N"] * (2 if activation == "swiglu" else 1):
        raise ValueError(
            f"w_in: got {size['W']} rows for w_out of {size['N']} columns, expected "
            f"{'twice' if activation == 'swiglu' else 'exactly'} as many with {activation!r}"
        )
    check_gate(gate, size["C"])
    _check.dtypes(_check.FLOATS, w_in=w_in, w_out=w_out)
    _check.dtypes(_check.FLOATS, x=x, norm_weight=norm_weight, norm_bias=norm_bias, gate=gate)
    _check.devices(x=x, norm_weight=norm_weight, norm_bias=norm_bias, w_in=w_in, w_out=w_out, gate=gate)
    return FORWARD(rows, norm_weight, norm_bias, w_in, w_out, gate, activation, eps, norm == "rms")[0].view(
        x.shape
    )
