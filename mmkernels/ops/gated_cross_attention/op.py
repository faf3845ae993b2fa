"""Flamingo's gated cross-attention: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.gated_cross_attention import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

NORMS = ("layer", "rms")

_CROSS = (
    "Tensor x, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor? uniform, Tensor norm_weight, Tensor? norm_bias, "
    "Tensor w_q, Tensor w_o, Tensor gate, "
)


def _fake_forward(x: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    r, heads = x.shape[0], rest[-3]
    wide = torch.promote_types(x.dtype, torch.float32)
    q, o = (k.new_empty((r, heads, k.shape[2])) for _ in range(2))
    row = x.new_empty(r, dtype=wide)
    return (x.new_empty(x.shape), q, o, x.new_empty((heads, r), dtype=wide), row, torch.empty_like(row))


def grads_like(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Empty gradients; an absent norm bias gets one as wide as the statistics, which autograd drops."""
    wide = torch.promote_types(x.dtype, torch.float32)
    absent = x.new_empty(x.shape[1], dtype=wide)
    inputs = (x, *others)
    return tuple(torch.empty_like(absent) if t is None else t.new_empty(t.shape) for t in inputs)


def _fake_backward(dy: Tensor, x: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return grads_like(x, k, v, *rest[3:8])


def _check_forward(x: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *rest: Any) -> None:
    _check.intervals(lo, hi, k.shape[0])


def kernel_dtypes(x: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str:
    """Why compiled kernels leave these inputs to the reference ("" when they do not)."""
    if k.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {k.dtype} runs on the reference"
    if x.dtype not in (k.dtype, torch.float32):
        return f"x in {x.dtype} beside {k.dtype} runs on the reference"
    width = k.shape[-1]
    return (
        "" if 0 < width <= 256 and width % 8 == 0 else f"head width {width} is not a multiple of 8 up to 256"
    )


FORWARD = Op(
    f"gated_cross_attention({_CROSS}int heads, float eps, bool rms) -> "
    "(Tensor y, Tensor q, Tensor o, Tensor lse, Tensor mean, Tensor rstd)",
    reference.forward,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    f"gated_cross_attention_backward(Tensor dy, {_CROSS}Tensor q, Tensor o, Tensor lse, Tensor mean, Tensor rstd, "
    "int heads, float eps, bool rms) -> (Tensor dx, Tensor dk, Tensor dv, Tensor dnorm_weight, Tensor dnorm_bias, "
    "Tensor dw_q, Tensor dw_o, Tensor dgate)",
    reference.backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.eps, ctx.rms = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    dx, dk, dv, dnw, dnb, dw_q, dw_o, dgate = BACKWARD(dy, *saved, ctx.heads, ctx.eps, ctx.rms)
    dnb = None if saved[7] is None else dnb
    return dx, dk, dv, None, None, None, dnw, dnb, dw_q, dw_o, dgate, None, None, None


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def gated_cross_attention(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_q: Tensor,
    w_o: Tensor,
    gate: Tensor,
    heads: int,
    uniform: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """Text attends to its images and adds the result through a gate that starts closed, as one op.

    `y = x + tanh(gate) * (attention(norm(x) w_q^T, k, v) w_o^T)`, row r over the keys `lo[r] .. hi[r] - 1`.

    **Shapes** x `[..., C]` with R rows; k, v `[Tk, G, D]`, G divides heads; lo, hi, uniform `[R]`; w_q `[heads * D, C]`,
    w_o `[C, heads * D]`; norm_weight, norm_bias `[C]`; gate `[1]` or `[C]`. Returns y like x.
    **Dtypes** float32, bfloat16, float16, float64. x, the norm and the gate may be float32 beside lower k, v, w_q, w_o: that is
    what autocast makes of float32 inputs. Statistics, softmax and sums in float32.
    **Gradient** x, k, v, norm, w_q, w_o, gate (exact at gate 0 too); deterministic; once differentiable.
    **Edge** rows with an empty interval return x; `uniform` rows average v. Scores are scaled by D^-1/2.
    **Raises** ValueError for shapes and names, TypeError for dtypes and devices; intervals as in `interval_attention`.
    **Source** Flamingo (arXiv 2204.14198) figure 4. **Speed** `mmkernels bench --op gated_cross_attention`.
    """
    k, v, w_q, w_o = _check.autocast(k, v, w_q, w_o)  # type: ignore[assignment]
    _check.choice("norm", norm, NORMS)
    rows = x.reshape(-1, x.shape[-1])
    size = _check.shapes(
        x=(rows, "R C"), k=(k, "Tk G D"), v=(v, "Tk G D"), lo=(lo, "R"), hi=(hi, "R"), uniform=(uniform, "R"),
        norm_weight=(norm_weight, "C"), norm_bias=(norm_bias, "C"), w_q=(w_q, "N C"), w_o=(w_o, "C N"),
    )  # fmt: skip
    if heads <= 0 or size["N"] != heads * size["D"] or size["G"] == 0 or heads % size["G"]:
        raise ValueError(
            f"heads: got {heads} with w_q of {size['N']} rows and k of {size['G']} heads of width {size['D']}, "
            "expected w_q to have heads * width rows and k's heads to divide heads"
        )
    check_gate(gate, size["C"])
    _check.dtypes(_check.FLOATS, k=k, v=v, w_q=w_q, w_o=w_o)
    _check.dtypes(_check.FLOATS, x=x, norm_weight=norm_weight, norm_bias=norm_bias, gate=gate)
    _check.dtypes((torch.int32,), lo=lo, hi=hi)
    _check.dtypes((torch.bool,), uniform=uniform)
    _check.devices(x=x, k=k, v=v, lo=lo, hi=hi, norm_weight=norm_weight, w_q=w_q, w_o=w_o, gate=gate)
    weights = (norm_weight, norm_bias, w_q, w_o, gate)
    return FORWARD(rows, k, v, lo, hi, uniform, *weights, heads, eps, norm == "rms")[0].view(x.shape)


def check_gate(gate: Tensor, width: int) -> None:
    if gate.dim() != 1 or gate.shape[0] not in (1, width):
        raise ValueError(f"gate: got shape {tuple(gate.shape)}, expected [1] or [{width}]")
