"""Mixtures of experts on the GPU: launchers, the experts over the grouped linear map's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mmkernels.ops.moe.reference import RULES
from mmkernels.ops.moe.triton import kernels
from mmkernels.primitives import _triton
from mmkernels.primitives.grouped_linear.reference import activate
from mmkernels.primitives.grouped_linear.triton import launch as grouped

CELLS, WARPS = 2048, 4  # numbers of a program's block of tokens
NONE = 2**31 - 1  # places where there is no limit


def _sizes(experts: int, k: int) -> dict[str, int]:
    width = max(2, triton.next_power_of_2(experts))
    return {"K": k, "EP": width, "ROWS": max(2, min(64, CELLS // width)), "num_warps": WARPS}


def _tokens(mask: Tensor | None, t: int, policy: str, logits: Tensor) -> Tensor:
    """How many tokens the losses average over, on the device."""
    if mask is None or policy == "deepspeed_top1":
        return torch.full((), max(t, 1), dtype=torch.float32, device=logits.device)
    return mask.sum().clamp(min=1).to(torch.float32)


def _share(hits: Tensor, tokens: Tensor, k: int, balance: str) -> Tensor:
    scale = len(hits) / k if balance == "megablocks" else len(hits)
    return (scale * hits / tokens / tokens).to(torch.float32)


def route(
    logits: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    k: int,
    capacity: int,
    policy: str,
    renormalize: str,
    balance: str,
) -> tuple[Tensor, ...]:
    """The operator moe_route: two launches around a prefix sum."""
    (t, e), rule = logits.shape, RULES[policy]
    logits, by_choice = _triton.unit_rows(logits), rule.choices
    noise = noise if noise is None or policy == "deepspeed_top1" else noise.contiguous()
    noise = None if policy == "deepspeed_top1" else noise
    mask = mask if mask is None else mask.contiguous()
    sizes, whole = _sizes(e, k), policy == "deepspeed_top1"
    blocks = triton.cdiv(t, sizes["ROWS"])
    experts, inverse = logits.new_empty((t, k), dtype=torch.int32), logits.new_empty(t * k, dtype=torch.int32)
    order, weights = inverse.new_full((t * k,), -1), logits.new_empty((t, k), dtype=torch.float32)
    found = inverse.new_empty((blocks * (k if by_choice else 1), e))
    share, square = weights.new_empty((blocks, e)), weights.new_empty(blocks)
    with torch.cuda.device_of(logits):
        if blocks:
            kernels.choose[(blocks,)](
                logits, noise, mask, experts, weights, found, share, square, logits.stride(0), t, e, blocks,
                CHOICES=by_choice, WHOLE=whole, **sizes,
            )  # fmt: skip
        ends = found.cumsum(0, dtype=torch.int32)
        chosen = found.sum(0, dtype=torch.int32)
        counts = chosen if capacity < 0 else chosen.clamp(max=capacity)
        offsets = F.pad(counts.cumsum(0, dtype=torch.int32)[:-1], (1, 0))
        if blocks:
            kernels.arrive[(blocks,)](
                experts, mask, ends - found, offsets, weights, order, inverse, t, e, blocks,
                NONE if capacity < 0 else capacity, CHOICES=by_choice, NORMALIZE=renormalize, **sizes,
            )  # fmt: skip
    tokens = _tokens(mask, t, policy, logits)
    hits = _hits(experts, mask, e) if balance == "deepspeed" and not by_choice and k > 1 else chosen
    if balance == "deepspeed" and by_choice:
        hits = found[:blocks].sum(0, dtype=torch.int32)
    aux, z = (_share(hits, tokens, k, balance) * share.sum(0)).sum(), square.sum() / tokens
    return weights, experts, order, inverse, counts, chosen.clone(), aux, z


def _hits(experts: Tensor, mask: Tensor | None, e: int) -> Tensor:
    """The first choices of every expert."""
    first = experts[:, :1] == torch.arange(e, dtype=torch.int32, device=experts.device)
    return (first if mask is None else first & mask.unsqueeze(1)).sum(0)


def route_backward(
    dweights: Tensor,
    daux: Tensor,
    dz: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    experts: Tensor,
    inverse: Tensor,
    policy: str,
    renormalize: str,
    balance: str,
) -> Tensor:
    """The operator moe_route_backward: one launch."""
    (t, e), k = logits.shape, experts.shape[1]
    logits, mask = _triton.unit_rows(logits), mask if mask is None else mask.contiguous()
    sizes, tokens = _sizes(e, k), _tokens(mask, t, policy, logits)
    hits = sum(_hits(experts[:, j : j + 1], mask, e) for j in range(1 if balance == "deepspeed" else k))
    dlogits = logits.new_empty(logits.shape)
    with torch.cuda.device_of(logits):
        if t:
            kernels.choose_backward[(triton.cdiv(t, sizes["ROWS"]),)](
                dweights.contiguous(), daux.contiguous(), dz.contiguous(), logits, mask, experts.contiguous(),
                inverse.contiguous(), _share(hits, tokens, k, balance), tokens, dlogits,  # type: ignore[arg-type]
                logits.stride(0), t, e, NORMALIZE=renormalize, WHOLE=policy == "deepspeed_top1", **sizes,
            )  # fmt: skip
    return dlogits


def combine(y: Tensor, weights: Tensor | None, inverse: Tensor, out: Tensor) -> Tensor:
    t, c = out.shape
    if out.numel():
        nb = min(1024, max(16, triton.next_power_of_2(c)))
        weights = weights if weights is None else weights.contiguous()
        kernels.combine[(t * triton.cdiv(c, nb),)](
            y, weights, inverse.contiguous(), out, len(y), c, len(inverse) // t, NB=nb, num_warps=4
        )
    return out


def _tokens_of(order: Tensor, k: int) -> Tensor:
    return torch.where(order < 0, -1, order // max(k, 1)).to(torch.int32)


_NO = (None, None, None, None, None)  # scale, residual, LoRA


def forward(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator moe_ffn: a gathered product with its activation, a product where rows stand, a sum."""
    m, token = len(order), _tokens_of(order, weights.shape[1])
    a, h = grouped.forward(x, w_in, counts, token, None, b_in, *_NO, activation, m, keep)
    y, _ = grouped.forward(a, w_out, counts, None, None, b_out, *_NO, "", m, False)
    with torch.cuda.device_of(x):
        return combine(y, weights, inverse, x.new_empty((len(x), w_out.shape[1]))), h


def backward(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    h: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The operator moe_ffn_backward. The weights' gradient is that of the middle times the middle: no row of y is needed."""
    inputs = (x, weights, w_in, w_out, b_in, b_out)
    grads = [
        t.new_zeros(t.shape) if n and t is not None else x.new_empty(0)
        for t, n in zip(inputs, needs, strict=True)
    ]
    m, token = len(order), _tokens_of(order, weights.shape[1])
    if m == 0 or dout.numel() == 0 or h.numel() == 0:
        return tuple(grads)
    dout, counts = _triton.unit_rows(dout), counts.contiguous()
    scale = torch.where(order < 0, 0, weights.reshape(-1)[order.clamp(0, m - 1).long()]).float()
    some = (token >= 0).unsqueeze(1)
    with torch.cuda.device_of(x):
        da = grouped.through(dout, w_out, counts, token, m, back=True)
        if needs[3] or needs[5]:
            wide = torch.where(some, dout[token.clamp(min=0).long()], 0)
            a = activate(h.float(), activation).to(x.dtype)
            into = grads[3] if needs[3] else w_out.new_empty(w_out.shape)
            dy = (wide * scale.unsqueeze(1)).to(x.dtype)
            grouped.weight_grad(dy, a, counts, token, (into, grads[5] if needs[5] else None), gathered=False)
        back = [needs[0], needs[2], needs[4], True, False, False, False]
        first = (x, w_in, counts, token, None, b_in, scale, None, None, None, None)
        dx, dw_in, db_in, dscale, *_ = grouped.backward(da, *first, h, activation, m, back)
    if needs[1]:
        if b_out is not None:
            owner = torch.searchsorted(counts.cumsum(0), torch.arange(m, device=x.device), right=True)
            rows = dout[token.clamp(min=0).long()].float()
            dscale = dscale + (rows * b_out[owner.clamp(max=len(counts) - 1)].float()).sum(1)
        at = inverse.long()
        found = torch.where((at >= 0) & (at < m), dscale[at.clamp(0, m - 1)], 0)
        grads[1] = found.view(weights.shape).to(weights.dtype)
    for i, grad in ((0, dx), (2, dw_in), (4, db_in)):
        grads[i] = grad if needs[i] and inputs[i] is not None else grads[i]
    return tuple(grads)
