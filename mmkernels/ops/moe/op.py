"""The experts: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.moe import reference
from mmkernels.ops.moe.route import Routing
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "quick_gelu", "swiglu")

_INPUTS = (
    "Tensor x, Tensor weights, Tensor order, Tensor inverse, Tensor counts, Tensor w_in, Tensor w_out, Tensor? b_in, "
    "Tensor? b_out, "
)
_DIFFERENTIABLE = (0, 1, 5, 6, 7, 8)  # places in _INPUTS


def _fake_forward(x: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    w_in, w_out, keep = rest[3], rest[4], rest[-1]
    out = x.new_empty((x.shape[0], w_out.shape[1]))
    return out, x.new_empty((weights.shape[0] * weights.shape[1] if keep else 0, w_in.shape[1]))


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, needs = rest[0], rest[-1]
    inputs = (rest[i] for i in _DIFFERENTIABLE)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _check_forward(
    x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor, *_: Any
) -> None:
    """Reads values. Rows past the counts may hold anything: nobody reads them."""
    routes, used = weights.numel(), int(counts.sum())
    if int(counts.min()) < 0 or used > routes:
        raise ValueError(
            f"routing.counts: got counts that add up to {used} with a smallest of {int(counts.min())}, expected none negative "
            f"and at most {routes} routes"
        )
    for name, index, low, high in (("order", order[:used], 0, routes), ("inverse", inverse, -1, used)):
        wrong = (index < low) | (index >= high)
        if bool(wrong.any()):
            row = int(wrong.to(torch.uint8).argmax())
            raise ValueError(
                f"routing.{name}: row {row} has {int(index[row])}, expected {low} <= it < {high}"
            )


FORWARD = Op(
    f"moe_ffn({_INPUTS}str activation, bool keep) -> (Tensor out, Tensor h)",
    reference.experts_forward,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    f"moe_ffn_backward(Tensor dout, {_INPUTS}Tensor h, str activation, bool[] needs) -> "
    "(Tensor dx, Tensor dweights, Tensor dw_in, Tensor dw_out, Tensor db_in, Tensor db_out)",
    reference.experts_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 11
    if dout is None:
        return tuple(grads)
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = BACKWARD(dout, *ctx.saved_tensors, ctx.activation, needs)
    for i, grad, need in zip(_DIFFERENTIABLE, found, needs, strict=True):
        grads[i] = grad if need else None
    return tuple(grads)


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def moe_ffn(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str | None = "swiglu",
) -> Tensor:
    """Every token through its experts, weighted and added up: dispatch, two products of each expert, combine.

    `out[t] = sum_j weights[t, j] (w_out[e] activation(w_in[e] x[t] + b_in[e]) + b_out[e])`, e = experts[t, j].

    **Shapes** x `[T, C]`; routing of T tokens and E experts (`moe_route`, `Routing.of`); w_in `[E, F, C]`, for swiglu
    `[E, 2 F, C]` with rows [gate; up]; w_out `[E, C', F]`; b_in `[E, F]` or `[E, 2 F]`, b_out `[E, C']`. activation None,
    "gelu" (erf), "gelu_tanh", "silu", "quick_gelu" or "swiglu". Returns `[T, C']`.
    **Dtypes** float32, bfloat16, float16, float64, one for x, w and b, which is the result's; routing.weights has its own. Sums
    in float32. Under autocast x, w and b take its dtype.
    **Gradient** x, routing.weights, w_in, w_out, b_in, b_out; deterministic; once differentiable. Kept for it: x, and the
    experts' middle before its activation; nothing of T K C numbers.
    **Edge** off the CPU the host reads nothing. A dropped route adds nothing, a token without routes is exactly 0, an expert
    without tokens costs nothing and has gradients of exactly 0.
    **Raises** ValueError for shapes and names, and on CPU (elsewhere with MMKERNELS_CHECK=1) for a routing with numbers out of
    range, which kernels never follow; TypeError for dtypes and devices.
    **Source** MoE-LLaVA (arXiv 2401.15947); MegaBlocks (arXiv 2211.15841); SonicMoE (arXiv 2512.14080).
    **Speed** `mmkernels bench --op moe`.
    """
    x, w_in, w_out, b_in, b_out = _check.autocast(x, w_in, w_out, b_in, b_out)  # type: ignore[assignment]
    _check.choice("activation", activation, ACTIVATIONS)
    tensors = (x, w_in, w_out, b_in, b_out)
    _check_arguments(tensors, routing, activation)
    learns = (*tensors, routing.weights)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learns)
    places = (routing.order, routing.inverse, routing.counts)
    return FORWARD(x, routing.weights, *places, *tensors[1:], activation or "", keep)[0]


def _check_arguments(tensors: tuple[Tensor | None, ...], routing: Routing, activation: str | None) -> None:
    x, w_in, w_out, b_in, b_out = tensors
    size = _check.shapes(
        x=(x, "T C"), w_in=(w_in, "E N C"), w_out=(w_out, "E O F"), b_in=(b_in, "E N"), b_out=(b_out, "E O"),
    )  # fmt: skip
    if size["N"] != size["F"] * (2 if activation == "swiglu" else 1):
        half = "half of " if activation == "swiglu" else ""
        raise ValueError(f"w_out: got {size['F']} columns, expected {half}w_in's {size['N']} rows")
    t, k = routing.weights.shape
    given = (t, routing.counts.shape[0])
    if given != (size["T"], size["E"]):
        raise ValueError(
            f"routing: got one of {given[0]} tokens and {given[1]} experts, expected {size['T']} tokens and {size['E']} experts"
        )
    for name, index in {"order": routing.order, "inverse": routing.inverse}.items():
        if tuple(index.shape) != (t * k,):
            raise ValueError(f"routing.{name}: got shape {tuple(index.shape)}, expected [{t * k}]")
    _check.dtypes(_check.FLOATS, x=x, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    _check.dtypes(_check.FLOATS, weights=routing.weights)
    _check.dtypes((torch.int32,), order=routing.order, inverse=routing.inverse, counts=routing.counts)
    _check.devices(
        x=x, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out, weights=routing.weights, order=routing.order,
        inverse=routing.inverse, counts=routing.counts,
    )  # fmt: skip
