"""Experts on several ranks: tokens travel to the ranks of their experts and back, one all-to-all each way.

The sizes of what travels are read by the host: that is the one wait of the layer. Nothing depends on whether a rank has tokens:
one that has none, or receives none, joins every exchange, forward and backward, with empty buffers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.layers.experts import Weights, combine, experts_ffn
from mmkernels.ops.moe import Routing


def slice_of(experts: int, group: dist.ProcessGroup) -> slice:
    """The experts of this rank: an equal run for each. **Raises** ValueError unless the ranks divide them."""
    ranks = dist.get_world_size(group)
    if experts % ranks:
        raise ValueError(
            f"group: got {ranks} ranks for {experts} experts, expected a number that divides them"
        )
    share = experts // ranks
    return slice(dist.get_rank(group) * share, (dist.get_rank(group) + 1) * share)


class _Exchange(torch.autograd.Function):
    """Rows `[sum(sent), C]` in the order of their ranks -> those of all ranks for this one; the gradient goes back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _all_to_all(gradients[0], received, sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def run_sharded(
    x: Tensor, routing: Routing, weights: Weights, activation: str, group: dist.ProcessGroup
) -> Tensor:
    """As `experts_ffn`, with the experts of `weights` on this rank and the others on theirs.

    **Shapes** x `[T, C]`, T of any size on each rank; the routing is this rank's tokens' over all experts. **Gradient** as of
    `moe_ffn`; weights receive what all ranks' losses say.
    """
    ranks, k = dist.get_world_size(group), routing.weights.shape[1]
    counts = routing.counts.view(ranks, -1)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts.contiguous(), group=group)
    sent, received = counts.sum(1).tolist(), theirs.sum(1).tolist()
    rows = x[(routing.order[: sum(sent)] // k).long()]
    arrived = _Exchange.apply(rows, sent, received, group)
    y = experts_ffn(arrived, _alone(theirs, arrived), weights, activation)  # type: ignore[arg-type]
    return combine(_Exchange.apply(y, received, sent, group), routing)  # type: ignore[arg-type]


def _alone(counts: Tensor, rows: Tensor) -> Routing:
    """The routing of rows that know their expert: those of rank after rank, each in the order of its experts."""
    ranks, experts = counts.shape
    each = torch.arange(experts, dtype=torch.int32, device=counts.device).repeat(ranks)
    ids = each.repeat_interleave(counts.flatten(), output_size=rows.shape[0]).unsqueeze(1)
    weights = rows.new_ones(ids.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    return Routing.of(ids, weights, experts)
