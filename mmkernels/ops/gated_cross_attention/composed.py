"""The gated blocks from library products around the kernels of interval attention.

The products are the device's own (MKL, cuBLAS); norm, activation and gate run over the rows in chunks, so that on CPU what one
step writes is still in cache when the next one reads it. Nothing of size rows x keys exists. Backward recomputes the normalised
rows and the queries, and takes the gate's gradient from U = dy^T inner (reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives._widen import operand as _operand

_CPU_CHUNK = 256  # rows: 2 MiB of 2048 float32 channels, an L2 cache


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
        unit = wide * rstd * norm.weight
        normed = unit if norm.bias is None else unit + norm.bias
        return normed.to(x.dtype), torch.zeros_like(rstd[:, 0]), rstd.squeeze(1)
    normed, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], norm.weight, norm.bias, norm.eps)
    return normed, mean.squeeze(1).float(), rstd.squeeze(1).float()


def _norm_backward(
    dn: Tensor, x: Tensor, norm: Norm, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx of the norm, and this chunk's share of dweight and dbias, all at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    unit = (x.to(wide) - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    dn = dn.to(wide)
    g = dn * norm.weight
    dx = g - unit * (g * unit).mean(1, keepdim=True)
    if not norm.rms:
        dx = dx - g.mean(1, keepdim=True)
    return dx * rstd.unsqueeze(1), (dn * unit).sum(0), dn.sum(0)


def _project_out(x: Tensor, inner: Tensor, w_out: Tensor, gate: Tensor) -> Tensor:
    """x + tanh(gate) * (inner w_out^T) in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = torch.mm(inner.to(w_out.dtype), w_out.t())
    return torch.addcmul(x.to(wide), torch.tanh(gate.to(wide)), branch.to(wide)).to(x.dtype)


def forward(
    core: Core, x: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, uniform: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator gated_cross_attention: y, o, lse, mean, rstd."""
    weight, bias, w_q, w_o, gate, heads, eps, rms = rest
    norm = Norm(weight, bias, eps, rms)
    q, mean, rstd = _queries(x, w_q, norm)
    o, lse = core.forward(*_stacked(q, k, v, heads), *_rules(k, lo, hi, uniform))
    o, lse = o.squeeze(0), lse.squeeze(0)
    y, w_o = torch.empty_like(x), _operand(w_o)
    for rows in _chunks(x):
        y[rows] = _project_out(x[rows], o[rows].flatten(1), w_o, gate)
    return y, o, lse, mean, rstd


def _queries(x: Tensor, w_q: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R, H D] in the weights' dtype and the norm's statistics."""
    q, operand = w_q.new_empty((len(x), len(w_q))), _operand(w_q)
    mean, rstd = (x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    for rows in _chunks(x):
        normed, mean[rows], rstd[rows] = _norm_rows(x[rows], norm)
        q[rows] = torch.mm(normed.to(operand.dtype), operand.t())
    return q, mean, rstd


def _stacked(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return q.unflatten(1, (heads, -1))[None], k[None], v[None]


def _rules(k: Tensor, lo: Tensor, hi: Tensor, uniform: Tensor | None) -> tuple[Any, ...]:
    uniform = None if uniform is None else uniform[None]
    return lo[None], hi[None], uniform, None, None, 1 / math.sqrt(k.shape[-1]), 0.0


def backward(core: Core, dy: Tensor, x: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The operator gated_cross_attention_backward."""
    lo, hi, uniform, weight, bias, w_q, w_o, gate, o, lse, mean, rstd, heads, eps, rms = rest
    norm = Norm(weight, bias, eps, rms)
    dw_o, dgate, do = _gate_backward(dy, o.flatten(1), w_o, gate)
    q, _, _ = _queries(x, w_q, norm)
    rules = _rules(k, lo, hi, uniform)
    stacked = _stacked(q, k, v, heads)
    dq, dk, dv = core.backward(do.view_as(stacked[0]), None, *stacked, o[None], lse[None], *rules)
    dx, dw_q, dweight, dbias = _input_backward(dy, x, dq.view_as(q), w_q, norm, mean, rstd)
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return dx, dk.squeeze(0), dv.squeeze(0), dweight.to(weight.dtype), dbias, dw_q, dw_o, dgate


def _gate_backward(dy: Tensor, inner: Tensor, w_out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dw_out, dgate and d inner (in inner's dtype) for y = x + tanh(gate) * (inner w_out^T)."""
    wide, operand = torch.promote_types(w_out.dtype, torch.float32), _operand(w_out)
    t = torch.tanh(gate.to(wide))
    dy = dy.to(operand.dtype)
    u = torch.mm(dy.t(), inner.to(operand.dtype)).to(wide)
    dgate = (1 - t * t) * (u * w_out).sum(1)
    dgate = dgate if gate.numel() > 1 else dgate.sum().view_as(gate)
    scaled = (operand * t.unsqueeze(-1)).to(operand.dtype)  # the gate goes to the smaller operand
    return (t.unsqueeze(-1) * u).to(w_out.dtype), dgate.to(gate.dtype), torch.mm(dy, scaled).to(inner.dtype)


def _input_backward(
    dy: Tensor, x: Tensor, dh: Tensor, w_in: Tensor, norm: Norm, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw_in, dweight, dbias for h = norm(x) w_in^T beside the residual y = x + ..."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dx, dw_in = torch.empty_like(x), torch.zeros_like(w_in, dtype=wide)
    dweight, dbias = (norm.weight.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    operand = _operand(w_in)
    for rows in _chunks(x):
        normed, _, _ = _norm_rows(x[rows], norm)
        d = dh[rows].to(operand.dtype)
        dw_in += torch.mm(d.t(), normed.to(operand.dtype))
        grads = _norm_backward(torch.mm(d, operand), x[rows], norm, mean[rows], rstd[rows])
        dx[rows] = dy[rows] + grads[0]
        dweight += grads[1]
        dbias += grads[2]
    return dx, dw_in.to(w_in.dtype), dweight, dbias


def feed_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, w_in: Tensor, w_out: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator gated_feed_forward: y, h, mean, rstd."""
    activation, eps, rms = rest
    h, mean, rstd = _queries(x, w_in, Norm(weight, bias, eps, rms))
    y, w_out = torch.empty_like(x), _operand(w_out)
    for rows in _chunks(x):
        y[rows] = _project_out(x[rows], _activate(h[rows], activation), w_out, gate)
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
