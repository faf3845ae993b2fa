"""The gated blocks from library products around the kernels of interval attention.

The products are the device's own (MKL, cuBLAS); norm, activation and gate run over the rows in chunks, so that on CPU what one
step writes is still in cache when the next one reads it. Nothing of size rows x keys exists. Backward recomputes the normalised
rows, and takes the gate's gradient from U = dy^T inner (reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives._widen import operand as _operand

_SUM_ROWS = 128
_CPU_CHUNK = 1024  # rows: products of 256 have run at half the speed


class Core(NamedTuple):
    """One backend's kernels of interval attention."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool


def _chunks(x: Tensor) -> Iterator[slice]:
    step = _CPU_CHUNK if x.device.type == "cpu" else max(len(x), 1)
    yield from (slice(i, i + step) for i in range(0, len(x), step))


def _norm_rows(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, mean [R] (zero for RMS) and 1 / standard deviation [R], statistics at least in float32."""
    if norm.rms:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (wide.square().mean(1, keepdim=True) + norm.eps).rsqrt()
        return _affine(wide * rstd, norm).to(x.dtype), torch.zeros_like(rstd[:, 0]), rstd.squeeze(1)
    normed, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], norm.weight, norm.bias, norm.eps)
    return normed, mean.squeeze(1).float(), rstd.squeeze(1).float()


def _affine(unit: Tensor, norm: Norm) -> Tensor:
    return unit * norm.weight if norm.bias is None else torch.addcmul(norm.bias, unit, norm.weight)


def _norm_backward(dn: Tensor, x: Tensor, norm: Norm, mean: Tensor, rstd: Tensor) -> Tensor:
    """dx of the norm, at least in float32."""
    weight, rstd = norm.weight.to(x.dtype), rstd.unsqueeze(1)
    if norm.rms:
        g, unit = dn * weight, x * rstd
        return (g - unit * (g * unit).mean(1, keepdim=True)) * rstd
    only_dx = [True, False, False]
    statistics = (mean.unsqueeze(1), rstd)
    return torch.ops.aten.native_layer_norm_backward(dn, x, [x.shape[1]], *statistics, weight, None, only_dx)[
        0
    ]


def _gated(w_out: Tensor, t: Tensor) -> tuple[Tensor, float]:
    """The output weight for products and the factor they still take: a gate of one number costs no pass over the weight on CPU,
    where reading it makes nobody wait."""
    operand = _operand(w_out)
    if operand.device.type == "cpu" and t.numel() == 1:
        return operand, float(t)
    return (operand * t.unsqueeze(-1)).to(operand.dtype), 1.0


def _project_out(x: Tensor, inner: Callable[[slice], Tensor], w_out: Tensor, gate: Tensor) -> Tensor:
    """x + tanh(gate) * (inner w_out^T) in x's dtype; `inner` gives its rows."""
    wide, y = torch.promote_types(x.dtype, torch.float32), torch.empty_like(x)
    t = torch.tanh(gate.to(wide))
    if _operand(w_out).dtype == wide:  # the product itself multiplies by the gate and adds to x
        operand, alpha = _gated(w_out, t)
        for rows in _chunks(x):
            terms = (x[rows].to(wide), inner(rows).to(wide), operand.t())
            if x.dtype == wide:
                torch.addmm(*terms, alpha=alpha, out=y[rows])
            else:
                y[rows] = torch.addmm(*terms, alpha=alpha)
        return y
    for rows in _chunks(x):
        branch = torch.mm(inner(rows).to(w_out.dtype), w_out.t())
        y[rows] = torch.addcmul(x[rows].to(wide), t, branch.to(wide))
    return y


def forward(
    core: Core, x: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, uniform: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator gated_cross_attention: y, q, o, lse, mean, rstd."""
    weight, bias, w_q, w_o, gate, heads, eps, rms = rest
    norm = Norm(weight, bias, eps, rms)
    q, mean, rstd = _norm_product(x, w_q, norm)
    q = q.unflatten(1, (heads, -1))
    o, lse = core.forward(q[None], k[None], v[None], *_rules(k, lo, hi, uniform))
    o, lse = o.squeeze(0), lse.squeeze(0)
    y = _project_out(x, lambda rows: o[rows].flatten(1), w_o, gate)
    return y, q, o, lse, mean, rstd


def _norm_product(x: Tensor, w: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) w^T in the weight's dtype, and the norm's statistics."""
    product, operand = w.new_empty((len(x), len(w))), _operand(w)
    mean, rstd = (x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    for rows in _chunks(x):
        normed, mean[rows], rstd[rows] = _norm_rows(x[rows], norm)
        if operand.dtype == w.dtype:
            torch.mm(normed.to(operand.dtype), operand.t(), out=product[rows])
        else:
            product[rows] = torch.mm(normed.to(operand.dtype), operand.t())
    return product, mean, rstd


def _rules(k: Tensor, lo: Tensor, hi: Tensor, uniform: Tensor | None) -> tuple[Any, ...]:
    uniform = None if uniform is None else uniform[None]
    return lo[None], hi[None], uniform, None, None, 1 / math.sqrt(k.shape[-1]), 0.0


def backward(core: Core, dy: Tensor, x: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The operator gated_cross_attention_backward."""
    lo, hi, uniform, weight, bias, w_q, w_o, gate, q, o, lse, mean, rstd, _, eps, rms = rest
    norm = Norm(weight, bias, eps, rms)
    dw_o, dgate, do = _gate_backward(dy, o.flatten(1), w_o, gate)
    rules = _rules(k, lo, hi, uniform)
    given = (q[None], k[None], v[None], o[None], lse[None])
    dq, dk, dv = core.backward(do.view_as(q)[None], None, *given, *rules)
    dx, dw_q, dweight, dbias = _input_backward(dy, x, dq.squeeze(0).flatten(1), w_q, norm, mean, rstd)
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return dx, dk.squeeze(0), dv.squeeze(0), dweight.to(weight.dtype), dbias, dw_q, dw_o, dgate


def _gate_backward(dy: Tensor, inner: Tensor, w_out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dw_out, dgate and d inner (in inner's dtype) for y = x + tanh(gate) * (inner w_out^T)."""
    wide = torch.promote_types(w_out.dtype, torch.float32)
    t = torch.tanh(gate.to(wide))
    operand, alpha = _gated(w_out, t)
    dy = dy.to(operand.dtype)
    u = torch.mm(dy.t(), inner.to(operand.dtype)).to(wide)
    parts = zip(u.split(_SUM_ROWS), w_out.split(_SUM_ROWS), strict=True)  # of a size that stays in cache
    dgate = (1 - t * t) * torch.cat([(a * b).sum(1) for a, b in parts])
    dgate = dgate if gate.numel() > 1 else dgate.sum().view_as(gate)
    dinner = torch.addmm(inner.new_empty((), dtype=operand.dtype), dy, operand, beta=0, alpha=alpha)
    return u.mul_(t.unsqueeze(-1)).to(w_out.dtype), dgate.to(gate.dtype), dinner.to(inner.dtype)


def _input_backward(
    dy: Tensor, x: Tensor, dh: Tensor, w_in: Tensor, norm: Norm, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_in, dweight, dbias for h = norm(x) w_in^T beside the residual y = x + ..."""
    wide, operand = torch.promote_types(x.dtype, torch.float32), _operand(w_in)
    dx, dw_in = torch.empty_like(x), torch.empty_like(w_in, dtype=operand.dtype)
    dweight, dbias = (norm.weight.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    for rows in _chunks(x):
        part, d = x[rows].to(wide), dh[rows].to(operand.dtype)
        unit = (part - mean[rows].unsqueeze(1)).mul_(rstd[rows].unsqueeze(1))
        dw_in.addmm_(d.t(), _affine(unit, norm).to(operand.dtype), beta=1 if rows.start else 0)
        dn = torch.mm(d, operand).to(wide)
        dweight += unit.mul_(dn).sum(0)
        dbias += dn.sum(0)
        dx[rows] = _norm_backward(dn, part, norm, mean[rows], rstd[rows]).add_(dy[rows])
    return dx, dw_in.to(w_in.dtype) if len(x) else dw_in.zero_().to(w_in.dtype), dweight, dbias


def feed_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, w_in: Tensor, w_out: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator gated_feed_forward: y, h, mean, rstd."""
    activation, eps, rms = rest
    h, mean, rstd = _norm_product(x, w_in, Norm(weight, bias, eps, rms))
    y = _project_out(x, lambda rows: _activate(h[rows], activation), w_out, gate)
    return y, h, mean, rstd


def feed_forward_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator gated_feed_forward_backward."""
    w_in, w_out, gate, h, mean, rstd, activation, eps, rms = rest
    dw_out, dgate, da = _gate_backward(dy, _activate(h, activation), w_out, gate)
    dh = _activate_backward(da, h, activation)
    norm = Norm(weight, bias, eps, rms)
    dx, dw_in, dweight, dbias = _input_backward(dy, x, dh, w_in, norm, mean, rstd)
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype), dw_in, dw_out, dgate


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return (
        {"gelu": F.gelu, "relu": F.relu}[activation](h)
        if activation != "squared_relu"
        else F.relu(h).square()
    )


def _activate_backward(da: Tensor, h: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        return torch.cat([aten.silu_backward(da * up, gate), da * F.silu(gate)], -1)
    if activation == "gelu":
        return aten.gelu_backward(da, h)
    return da * 2 * F.relu(h) if activation == "squared_relu" else aten.threshold_backward(da, h, 0)
