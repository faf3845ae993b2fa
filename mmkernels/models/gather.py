"""Batches of all ranks, one after another. Without `torch.distributed` there is one rank, and nothing is done."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' number among the ranks."""
    return dist.get_rank() if _ranks() > 1 else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """`[B, ...]` of every rank, of one shape -> `[ranks B, ...]`, in their order and without a gradient, this rank's too."""
    if _ranks() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(_ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """The same with a gradient: each rank receives what all ranks' losses say about its rows."""
    return x if _ranks() == 1 else _Gather.apply(x)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]
