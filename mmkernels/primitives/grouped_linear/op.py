"""Grouped linear: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.primitives import _check
from mmkernels.primitives._op import Op
from mmkernels.primitives.grouped_linear import reference

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "quick_gelu", "swiglu")

_INPUTS = (
    "Tensor x, Tensor weight, Tensor counts, Tensor? gather, Tensor? scatter, Tensor? bias, Tensor? row_scale, "
    "Tensor? residual, Tensor? lora_a, Tensor? lora_b, Tensor? lora_counts, "
)
_DIFFERENTIABLE = (0, 1, 5, 6, 7, 8, 9)  # places in _INPUTS


def out_width(weight: Tensor, activation: str) -> int:
    return weight.shape[1] // 2 if activation == "swiglu" else weight.shape[1]


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gather, residual, activation, rows, keep = rest[1], rest[5], *rest[-3:]
    m = x.shape[0] if gather is None else gather.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    out = x.new_empty((rows, out_width(weight, activation)), dtype=dtype)
    return out, x.new_empty((m if keep else 0, weight.shape[1]))


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, needs = rest[0], rest[-1]
    inputs = (rest[i] for i in _DIFFERENTIABLE)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _check_forward(x: Tensor, weight: Tensor, counts: Tensor, *rest: Any) -> None:
    """Reads values. Rows past the counts may hold any index: nobody reads them."""
    gather, scatter, lora_counts, rows = rest[0], rest[1], rest[7], rest[9]
    m = x.shape[0] if gather is None else gather.shape[0]
    used = _check_counts("counts", counts, m)
    if lora_counts is not None:
        _check_counts("lora", lora_counts, m)
    if gather is not None:
        _check_index("gather", gather, used, 0, x.shape[0])
    if scatter is not None:
        places = _check_index("scatter", scatter, used, -1, rows)
        kept = places[places >= 0]
        hits = np.bincount(kept)
        if hits.max(initial=0) > 1:
            raise ValueError(
                f"scatter: got {len(kept)} rows into {np.count_nonzero(hits)} places, expected distinct places"
            )


def _check_counts(name: str, counts: Tensor, m: int) -> int:
    found = counts.cpu().numpy()
    total, least = int(found.sum(dtype=np.int64)), int(found.min(initial=0))
    if least < 0 or total > m:
        raise ValueError(
            f"{name}: got counts that add up to {total} with a smallest of {least}, "
            f"expected none negative and at most the {m} rows"
        )
    return total


def _check_index(name: str, index: Tensor, used: int, low: int, size: int) -> np.ndarray[Any, Any]:
    found = index.cpu().numpy()[:used]
    wrong = (found < low) | (found >= size)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name}: row {row} has index {found[row]}, expected {low} <= index < {size} rows")
    return found


FORWARD = Op(
    f"grouped_linear({_INPUTS}str activation, int rows, bool keep) -> (Tensor out, Tensor h)",
    reference.forward,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    f"grouped_linear_backward(Tensor dout, {_INPUTS}Tensor h, str activation, int rows, bool[] needs) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor drow_scale, Tensor dresidual, Tensor dlora_a, Tensor dlora_b)",
    reference.backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.rows, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 14
    if dout is None:
        return tuple(grads)
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = BACKWARD(dout, *ctx.saved_tensors, ctx.activation, ctx.rows, needs)
    for i, grad, need in zip(_DIFFERENTIABLE, found, needs, strict=True):
        grads[i] = grad if need else None
    return tuple(grads)


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
    lora: tuple[Tensor, Tensor, Tensor] | None = None,
    rows: int | None = None,
) -> Tensor:
    """Rows go through the weight of their group: group e owns the `counts[e]` rows after those of group e - 1.

    `h[i] = x[gather[i]] weight[e]^T + bias[e] + (x[gather[i]] a[s]^T) b[s]^T`,
    `out[scatter[i]] = residual[scatter[i]] + row_scale[i] * activation(h[i])`.

    **Shapes** x `[R, C]`; weight `[E, N, C]`, or `[1, N, C]` shared by all groups; counts `[E]`; gather, scatter, row_scale
    `[M]`, M = R without gather; bias `[E, N]`, `[1, N]` with a shared weight; `lora = (a [S, K, C], b [S, N, K], counts [S])`,
    segments of the same M rows; out and residual `[rows, N]`, `rows` being M by default. activation None, "gelu" (erf),
    "gelu_tanh", "silu", "quick_gelu", or "swiglu": weight, bias and b then are [gate; up] and out is `[rows, N / 2]`.
    **Dtypes** float32, bfloat16, float16, float64, one for x, weight, bias, a, b; row_scale has its own; residual x's or
    float32, and out has residual's. counts, gather, scatter int32. Sums in float32. Under autocast x, weight, bias, a, b take
    its dtype.
    **Gradient** x, weight, bias, row_scale, residual, a, b; rows gathered twice add up in order; deterministic; once
    differentiable; nothing is computed for an input that asks for none.
    **Edge** off the CPU the host reads nothing. Rows past `sum(counts)` belong to no group: whatever they hold, they reach
    nothing. `scatter[i] = -1` drops row i, as if it belonged to no group. A row of out that no row reaches is 0, whatever its
    residual. An empty group costs nothing and its gradients are exactly 0; rows past the segments have no LoRA.
    **Raises** ValueError for shapes and names, and on CPU (elsewhere with MMKERNELS_CHECK=1) for counts that add up to more
    than M, an index outside its rows, and a place that is scattered to twice; TypeError for dtypes and devices. Kernels ignore
    such rows: they never read out of bounds.
    **Source** CogVLM (arXiv 2311.03079) section 2.2; MegaBlocks (arXiv 2211.15841).
    **Speed** `mmkernels bench --op grouped_linear`.
    """
    a, b, lora_counts = (None, None, None) if lora is None else lora
    x, weight, bias, a, b = _check.autocast(x, weight, bias, a, b)  # type: ignore[assignment]
    _check.choice("activation", activation, ACTIVATIONS)
    if weight.dim() == 3 and weight.shape[0] == 1 and counts.dim() == 1 and counts.shape[0] != 1:
        counts = counts.sum(0, keepdim=True, dtype=counts.dtype)
    inputs = (x, weight, counts, gather, scatter, bias, row_scale, residual, a, b, lora_counts)
    rows = _check_arguments(inputs, activation or "", rows)
    wanted = (x, weight, bias, row_scale, a, b)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
    keep = learns and (activation is not None or row_scale is not None)
    return FORWARD(*inputs, activation or "", rows, keep)[0]


def _check_arguments(inputs: tuple[Any, ...], activation: str, rows: int | None) -> int:
    """Returns the number of output rows."""
    x, weight, counts, gather, scatter, bias, row_scale, residual, a, b, lora_counts = inputs
    size = _check.shapes(
        x=(x, "R C"), weight=(weight, "E N C"), counts=(counts, "E"), bias=(bias, "E N"),
        lora_a=(a, "S K C"), lora_b=(b, "S N K"), lora_counts=(lora_counts, "S"),
    )  # fmt: skip
    if size["E"] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected at least one group")
    if activation == "swiglu" and size["N"] % 2:
        raise ValueError(f"weight: got {size['N']} rows, expected an even number [gate; up] for swiglu")
    m = x.shape[0] if gather is None else gather.shape[0]
    if rows is not None and rows < 0:
        raise ValueError(f"rows: got {rows}, expected a number of rows")
    outs = m if rows is None else rows
    for name, value in {"gather": gather, "scatter": scatter, "row_scale": row_scale}.items():
        if value is not None and tuple(value.shape) != (m,):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{m}]")
    shape = (outs, out_width(weight, activation))
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {list(shape)}")
    _check.dtypes(_check.FLOATS, x=x, weight=weight, bias=bias, lora_a=a, lora_b=b)
    _check.dtypes(_check.FLOATS, row_scale=row_scale)
    _check.dtypes((x.dtype, torch.float32), residual=residual)
    _check.dtypes((torch.int32,), counts=counts, gather=gather, scatter=scatter, lora_counts=lora_counts)
    _check.devices(
        x=x, weight=weight, counts=counts, gather=gather, scatter=scatter, bias=bias, row_scale=row_scale,
        residual=residual, lora_a=a, lora_b=b, lora_counts=lora_counts,
    )  # fmt: skip
    return outs
