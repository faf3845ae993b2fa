"""Flamingo's gated cross-attention, the law. R = B T text rows, C width, H heads, D head width, I images, L latents.

    y = x + tanh(gate) * (attention(norm(x) Wq^T, k, v) Wo^T)             attention over each row's interval of media keys
    y = x + tanh(gate) * (act(norm(x) Win^T) Wout^T)                      the gated feed-forward after it

Widened to float32 (float64 stays). Backward by the chain rule, line for line; the gate's gradient needs no stored output:
with U = dy^T o, dWo = tanh(g) U and dgate = (1 - tanh^2 g) sum_h U Wo.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives.interval_attention import reference as attention


def media_intervals(
    media_locations: Tensor,
    latents: int,
    num_media: int,
    all_previous: bool,
    use_cached_media: bool,
    attend_previous: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi int32 and uniform bool, each [B rows], over the flat keys [B num_media latents] (spec: media mask)."""
    b = media_locations.shape[0]
    total = media_locations.sum(1, keepdim=True)
    if use_cached_media:
        time = total.expand(b, rows)
    else:
        time = media_locations.cumsum(1)
    if not attend_previous:  # Otter: text belongs to the image that follows it
        time = time + (0 if use_cached_media else (~media_locations).long())
        time = torch.where(time > total, 0, time)
    overflow = time > num_media
    if all_previous:
        lo, hi = torch.zeros_like(time), time.clamp(max=num_media) * latents
        uniform = time == 0
    else:
        lo, hi = (time - 1).clamp(min=0) * latents, time * latents
        uniform = overflow
    lo = torch.where(uniform, 0, lo)
    hi = torch.where(uniform, num_media * latents, hi)
    base = torch.arange(b, device=time.device).view(b, 1) * (num_media * latents)
    return (base + lo).int().flatten(), (base + hi).int().flatten(), uniform.flatten()


def _norm(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows before the affine part, mean [R] (zero for RMS) and 1 / standard deviation [R]."""
    mean = torch.zeros_like(x[:, 0]) if rms else x.mean(1)
    centred = x - mean.unsqueeze(1)
    rstd = (centred.square().mean(1) + eps).rsqrt()
    return centred * rstd.unsqueeze(1), mean, rstd


def _norm_backward(
    dn: Tensor, unit: Tensor, weight: Tensor, rstd: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias from the gradient of the affine result."""
    g = dn * weight
    dx = g - unit * (g * unit).mean(1, keepdim=True)
    if not rms:
        dx = dx - g.mean(1, keepdim=True)
    return dx * rstd.unsqueeze(1), (dn * unit).sum(0), dn.sum(0)


def _wide(*tensors: Tensor | None) -> list[Tensor]:
    dtype = torch.promote_types(next(t for t in tensors if t is not None).dtype, torch.float32)
    return [t if t is None else t.to(dtype) for t in tensors]  # type: ignore[misc]


def _affine(unit: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return unit * weight if bias is None else unit * weight + bias


def forward(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    uniform: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_q: Tensor,
    w_o: Tensor,
    gate: Tensor,
    heads: int,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [R,C] and what backward wants: q and o [R,H,D], lse [H,R], mean [R], rstd [R]."""
    x_, k_, v_, nw, nb, wq, wo, g = _wide(x, k, v, norm_weight, norm_bias, w_q, w_o, gate)
    unit, mean, rstd = _norm(x_, eps, rms)
    q = (_affine(unit, nw, nb) @ wq.T).unflatten(1, (heads, -1))
    o, lse = attention.forward(q[None], k_[None], v_[None], *_rules(lo, hi, uniform, q))
    o = o.squeeze(0)
    y = x_ + torch.tanh(g) * (o.flatten(1) @ wo.T)
    return y.to(x.dtype), q.to(k.dtype), o.to(k.dtype), lse.squeeze(0), mean, rstd


def _rules(lo: Tensor, hi: Tensor, uniform: Tensor | None, q: Tensor) -> tuple[object, ...]:
    uniform = None if uniform is None else uniform[None]
    return lo[None], hi[None], uniform, None, None, 1 / math.sqrt(q.shape[-1]), 0.0


def backward(
    dy: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    uniform: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_q: Tensor,
    w_o: Tensor,
    gate: Tensor,
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    heads: int,
    eps: float,
    rms: bool,
) -> tuple[Tensor, ...]:
    """dx, dk, dv, dnorm_weight, dnorm_bias (zeros without a bias), dw_q, dw_o, dgate."""
    dy_, x_, k_, v_, nw, nb, wq, wo, g, o_ = _wide(dy, x, k, v, norm_weight, norm_bias, w_q, w_o, gate, o)
    unit, _, rstd = _norm(x_, eps, rms)
    normed = _affine(unit, nw, nb)
    q = (normed @ wq.T).unflatten(1, (heads, -1))
    t = torch.tanh(g)
    dw_o, dgate = _gate_backward(dy_, o_.flatten(1), wo, t)
    do = ((dy_ * t) @ wo).view_as(q)
    dq, dk, dv = attention.backward(
        do[None], None, q[None], k_[None], v_[None], o_[None], lse[None], *_rules(lo, hi, uniform, q)
    )
    dq = dq.squeeze(0).flatten(1)
    dx, dweight, dbias = _norm_backward(dq @ wq, unit, nw, rstd, rms)
    grads = (dy_ + dx, dk.squeeze(0), dv.squeeze(0), dweight, dbias, dq.T @ normed, dw_o, dgate)
    return _like(grads, (x, k, v, norm_weight, norm_bias, w_q, w_o, gate))


def _gate_backward(dy: Tensor, inner: Tensor, w_out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the output weight [C, N] and the gate ([1] or [C]) for y = x + t * (inner w_out^T)."""
    u = dy.T @ inner
    dgate = (1 - t * t) * (u * w_out).sum(1)
    return t.unsqueeze(-1) * u, dgate if t.numel() > 1 else dgate.sum().view_as(t)


def _like(grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Gradients in their inputs' dtypes, contiguous; an absent input's gradient keeps its own."""
    return tuple(
        g.contiguous() if x is None else g.to(x.dtype).contiguous()
        for g, x in zip(grads, inputs, strict=True)
    )


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(h)
    return F.relu(h).square() if activation == "squared_relu" else F.relu(h)


def _activate_backward(da: Tensor, h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        return torch.cat([da * up * s * (1 + gate * (1 - s)), da * gate * s], -1)
    if activation == "gelu":
        pdf = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
        return da * (0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * pdf)
    return da * (2 * F.relu(h)) if activation == "squared_relu" else da * (h > 0)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor,
    activation: str,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [R,C] and what backward wants: h [R,N] before the activation, mean [R], rstd [R]."""
    x_, nw, nb, win, wout, g = _wide(x, norm_weight, norm_bias, w_in, w_out, gate)
    unit, mean, rstd = _norm(x_, eps, rms)
    h = _affine(unit, nw, nb) @ win.T
    y = x_ + torch.tanh(g) * (_activate(h, activation) @ wout.T)
    return y.to(x.dtype), h.to(w_in.dtype), mean, rstd


def feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    eps: float,
    rms: bool,
) -> tuple[Tensor, ...]:
    """dx, dnorm_weight, dnorm_bias (zeros without a bias), dw_in, dw_out, dgate."""
    dy_, x_, nw, nb, win, wout, g = _wide(dy, x, norm_weight, norm_bias, w_in, w_out, gate)
    unit, _, rstd = _norm(x_, eps, rms)
    normed = _affine(unit, nw, nb)
    h_ = normed @ win.T
    t = torch.tanh(g)
    dw_out, dgate = _gate_backward(dy_, _activate(h_, activation), wout, t)
    dh = _activate_backward((dy_ * t) @ wout, h_, activation)
    dx, dweight, dbias = _norm_backward(dh @ win, unit, nw, rstd, rms)
    grads = (dy_ + dx, dweight, dbias, dh.T @ normed, dw_out, dgate)
    return _like(grads, (x, norm_weight, norm_bias, w_in, w_out, gate))
