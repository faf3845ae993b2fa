"""Feed-forwards of routed tokens, for every activation that a decoder has."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.layers.mlp import ACTIVATIONS, GATED
from mmkernels.ops.moe import Routing, moe_ffn
from mmkernels.ops.moe.op import ACTIVATIONS as FUSED
from mmkernels.primitives.grouped_linear import grouped_linear

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def experts_ffn(x: Tensor, routing: Routing, weights: Weights, activation: str) -> Tensor:
    """`moe_ffn` of `(w_in, w_out, b_in, b_out)`; activations that it does not have stand between two grouped products."""
    w_in, w_out, b_in, b_out = weights
    if activation in FUSED:
        return moe_ffn(x, routing, w_in, w_out, b_in=b_in, b_out=b_out, activation=activation)
    token = routing.order // routing.weights.shape[1]
    h = grouped_linear(x, w_in, routing.counts, gather=token, bias=b_in)
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        h = GATED[activation](gate) * up
    else:
        h = ACTIVATIONS[activation](h)
    return combine(grouped_linear(h, w_out, routing.counts, bias=b_out), routing)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """`out[t] = sum_j w[t, j] y[place of (t, j)]`, j after j; a route that was dropped adds nothing."""
    wide = torch.promote_types(y.dtype, torch.float32)
    at = routing.inverse.view(routing.weights.shape).long()
    weights = torch.where(at >= 0, routing.weights, 0).to(wide)
    padded = torch.cat([y, y.new_zeros(1, y.shape[1])])
    found = padded[torch.where(at >= 0, at, y.shape[0])]
    return (found.to(wide) * weights.unsqueeze(-1)).sum(1).to(y.dtype)
