"""The visual expert's linear map: schema, gradient, public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.visual_expert import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op
from mmkernels.primitives.routing import Groups, route_groups

ACTIVATIONS = (None, "gelu", "silu", "quick_gelu", "swiglu")

_INPUTS = (
    "Tensor x, Tensor counts, Tensor? gather, Tensor? scatter, Tensor w_text, Tensor w_vision, Tensor? b_text, "
    "Tensor? b_vision, "
)
_DIFFERENTIABLE = (0, 4, 5, 6, 7)  # places in _INPUTS
_RESIDUAL = 8
_TURN = "Tensor? cos, Tensor? sin, "


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    w_text, residual, activation, keep = rest[3], rest[7], *rest[-2:]
    r, n = x.shape[0], w_text.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    out = x.new_empty((r, n // 2 if activation == "swiglu" else n), dtype=dtype)
    return out, x.new_empty((r if keep else 0, n))


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, needs = rest[0], rest[-1]
    inputs = (rest[i] for i in _DIFFERENTIABLE)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _check_forward(x: Tensor, counts: Tensor, gather: Tensor | None, scatter: Tensor | None, *_: Any) -> None:
    r, (text, vision) = x.shape[0], counts.tolist()
    if text < 0 or vision < 0 or text + vision != r:
        raise ValueError(
            f"counts: got {text} text and {vision} vision rows, expected them to add up to {r} rows"
        )
    for name, index in {"gather": gather, "scatter": scatter}.items():
        if index is not None and r and (int(index.min()) < 0 or int(index.max()) >= r):
            raise ValueError(
                f"{name}: got places {int(index.min())} to {int(index.max())}, expected 0 to {r - 1}"
            )


FORWARD = Op(
    f"modality_linear({_INPUTS}Tensor? residual, {_TURN}int turned, str activation, bool keep) -> (Tensor out, Tensor h)",
    reference.forward,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    f"modality_linear_backward(Tensor dout, {_INPUTS}{_TURN}Tensor h, int turned, str activation, bool[] needs) -> "
    "(Tensor dx, Tensor dw_text, Tensor dw_vision, Tensor db_text, Tensor db_vision)",
    reference.backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, residual, cos, sin, ctx.turned, ctx.activation, _ = inputs
    ctx.residual = residual is not None
    ctx.save_for_backward(*tensors, cos, sin, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 14
    if dout is None:
        return tuple(grads)
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if any(needs):
        found = BACKWARD(dout, *ctx.saved_tensors, ctx.turned, ctx.activation, needs)
        for i, grad, need in zip(_DIFFERENTIABLE, found, needs, strict=True):
            grads[i] = grad if need else None
    grads[_RESIDUAL] = dout if ctx.residual else None
    return tuple(grads)


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def modality_linear(
    x: Tensor,
    is_vision: Tensor | Groups,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None = None,
    b_vision: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    sorted_input: bool = False,
    sorted_output: bool = False,
) -> Tensor:
    """Every row goes through the weight of its modality: CogVLM's expert choice, without a mask, a copy or a host sync.

    `out[i] = residual[i] + activation(is_vision[i] ? x[i] w_vision^T + b_vision : x[i] w_text^T + b_text)`.

    **Shapes** x `[R, C]`; is_vision bool `[R]`, or what `route_groups` made of it, once for all layers; weights `[N, C]`,
    biases `[N]`, either of which may be None; residual and out `[R, N]`. activation None, "gelu" (erf), "silu", "quick_gelu",
    or "swiglu": weights and biases then are [gate; up] and out is `[R, N / 2]`. `sorted_input`: x stands in group order, text
    first (`Groups.order`); `sorted_output`: out will, and the residual does.
    **Dtypes** float32, bfloat16, float16, float64, one for x, weights and biases; residual x's or float32, and out has
    residual's. Sums in float32. Under autocast x, weights and biases take its dtype.
    **Gradient** x, weights, biases, residual; deterministic; once differentiable; a frozen modality costs nothing.
    **Edge** a modality without rows: its weight is not read, its gradients are exactly 0. No rows: `[0, N]`.
    **Raises** ValueError for shapes and names, TypeError for dtypes and devices.
    **Source** CogVLM (arXiv 2311.03079) section 2.2. **Speed** `mmkernels bench --op visual_expert`.
    """
    x, w_text, w_vision, b_text, b_vision = _check.autocast(x, w_text, w_vision, b_text, b_vision)  # type: ignore[assignment]
    _check.choice("activation", activation, ACTIVATIONS)
    tensors = (x, w_text, w_vision, b_text, b_vision)
    _check_arguments(tensors, residual, activation)
    groups = routed(is_vision, x.shape[0])
    _check.devices(x=x, is_vision=groups.order)
    gather, scatter = None if sorted_input else groups.order, None if sorted_output else groups.order
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    keep = learns and activation is not None
    weights = (w_text, w_vision, b_text, b_vision)
    return FORWARD(
        x, groups.counts, gather, scatter, *weights, residual, None, None, 0, activation or "", keep
    )[0]


def routed(is_vision: Tensor | Groups, rows: int) -> Groups:
    """The rows of both modalities. **Raises** ValueError, TypeError unless `is_vision` is about so many rows."""
    if isinstance(is_vision, Groups):
        if is_vision.order.shape != (rows,) or is_vision.counts.shape != (2,):
            raise ValueError(
                f"is_vision: got {len(is_vision.counts)} groups of {len(is_vision.order)} rows, expected 2 groups of x's "
                f"{rows} rows"
            )
        return is_vision
    if is_vision.shape != (rows,):
        raise ValueError(f"is_vision: got shape {tuple(is_vision.shape)}, expected [{rows}] like x's rows")
    _check.dtypes((torch.bool,), is_vision=is_vision)
    return route_groups(is_vision)


def _check_arguments(
    tensors: tuple[Tensor | None, ...], residual: Tensor | None, activation: str | None
) -> None:
    x, w_text, w_vision, b_text, b_vision = tensors
    size = _check.shapes(
        x=(x, "R C"), w_text=(w_text, "N C"), w_vision=(w_vision, "N C"), b_text=(b_text, "N"), b_vision=(b_vision, "N"),
    )  # fmt: skip
    n = size["N"]
    if activation == "swiglu":
        if n % 2:
            raise ValueError(f"w_text: got {n} rows, expected an even number [gate; up] for swiglu")
        n //= 2
    assert x is not None
    if residual is not None and tuple(residual.shape) != (size["R"], n):
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {[size['R'], n]}")
    _check.dtypes(_check.FLOATS, x=x, w_text=w_text, w_vision=w_vision, b_text=b_text, b_vision=b_vision)
    _check.dtypes((x.dtype, torch.float32), residual=residual)
    _check.devices(x=x, w_text=w_text, w_vision=w_vision, b_text=b_text, b_vision=b_vision, residual=residual)


def expert_qkv(
    x: Tensor,
    is_vision: Tensor | Groups,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None = None,
    b_vision: Tensor | None = None,
    *,
    rotary: tuple[Tensor, Tensor],
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by the weight of each row's modality, q and k turned to the row's position.

    `[q k v] = modality_linear(x)`; of each head of q and k, halves a and b become `(a cos - b sin, b cos + a sin)`.

    **Shapes** x `[R, C]`; is_vision as in `modality_linear`; weights `[(H + 2 G) D, C]`, rows all q, all k, all v; rotary =
    (cos, sin), each `[R, D / 2]`. Returns q `[R, H, D]`, k and v `[R, G, D]`, views of one tensor.
    **Dtypes** as `modality_linear`; the table's is x's: round it first. **Gradient** x, weights, biases.
    **Edge** as `modality_linear`. **Raises** ValueError for shapes, TypeError for dtypes and devices.
    **Source** CogVLM (arXiv 2311.03079) section 2.2, RoFormer (arXiv 2104.09864).
    **Speed** `mmkernels bench --op visual_expert`.
    """
    x, w_text, w_vision, b_text, b_vision = _check.autocast(x, w_text, w_vision, b_text, b_vision)  # type: ignore[assignment]
    _check_arguments((x, w_text, w_vision, b_text, b_vision), None, None)
    cos, sin = rotary
    half = _check.shapes(x=(x, "R C"), cos=(cos, "R W"), sin=(sin, "R W"))["W"]
    _check.dtypes((x.dtype,), cos=cos, sin=sin)
    _check.positive(heads=heads, kv_heads=kv_heads)
    if w_text.shape[0] != 2 * half * (heads + 2 * kv_heads):
        raise ValueError(
            f"w_text: got {w_text.shape[0]} rows, expected {heads} + 2 * {kv_heads} heads of twice the table's {half} angles"
        )
    groups = routed(is_vision, x.shape[0])
    _check.devices(x=x, is_vision=groups.order, cos=cos, sin=sin)
    weights = (w_text, w_vision, b_text, b_vision)
    qkv, _ = FORWARD(
        x, groups.counts, groups.order, groups.order, *weights, None, cos, sin, heads + kv_heads, "", False
    )
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, 2 * half)).split((heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def expert_mlp(
    x: Tensor,
    is_vision: Tensor | Groups,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Every row through the gated feed-forward of its modality: `residual + down(silu(gate x) * up x)`.

    **Shapes** x `[R, C]`; is_vision as in `modality_linear`; `up` and `down` are (text, vision): each up `[2 F, C]`, rows
    [gate; up], each down `[C', F]`; residual and the result `[R, C']`.
    **Dtypes**, **Gradient**, **Edge** as `modality_linear`. Between the two products rows stay in group order: nothing is
    scattered. **Raises** ValueError for shapes, TypeError for dtypes and devices.
    **Source** CogVLM (arXiv 2311.03079) section 2.2. **Speed** `mmkernels bench --op visual_expert`.
    """
    size = _check.shapes(
        x=(x, "R C"), up_text=(up[0], "N C"), up_vision=(up[1], "N C"), down_text=(down[0], "O F"),
        down_vision=(down[1], "O F"),
    )  # fmt: skip
    if size["N"] != 2 * size["F"]:
        raise ValueError(f"down: got {size['F']} columns, expected half of up's {size['N']} rows [gate; up]")
    groups = routed(is_vision, x.shape[0])
    h = modality_linear(x, groups, *up, activation="swiglu", sorted_output=True)
    return modality_linear(h, groups, *down, residual=residual, sorted_input=True)
