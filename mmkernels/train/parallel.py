"""A model on several ranks: experts apart from one another, everything else sharded by FSDP2, tokens on all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmkernels.layers.moe import MoE
from mmkernels.models import MultimodalModel


def parallelize(model: MultimodalModel, mesh: DeviceMesh) -> None:
    """Spreads a model over a mesh of one dimension, in place: every rank trains on tokens of its own.

    Each rank keeps its share of the experts, whole; all other parameters are sharded block by block and gathered when their
    block runs. Gradients are means over the ranks' losses, those of experts too.

    **Edge** what a stage trains has to be chosen before (`Stage.freeze`). **Raises** ValueError unless the ranks divide the
    experts of every layer; nothing is changed then.
    """
    group, ranks = mesh.get_group(), mesh.size()
    moes = [part for part in model.modules() if isinstance(part, MoE)]
    for moe in moes:
        if moe.experts % ranks:
            raise ValueError(
                f"mesh: got {ranks} ranks for {moe.experts} experts, expected a number that divides them"
            )
    apart: set[nn.Parameter] = set()
    for moe in moes:
        moe.shard(group)
        own = {p for p in (moe.w_in, moe.w_out, moe.b_in, moe.b_out) if p is not None}
        for p in own:
            if p.requires_grad:
                p.register_hook(lambda grad: grad / ranks)
        apart |= own
        fully_shard(moe.gate, mesh=mesh)  # a group of its own: it stays in float32
    for block in model.lm.blocks:
        fully_shard(block, mesh=mesh, ignored_params=apart)
    fully_shard(model, mesh=mesh, ignored_params=apart)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, mesh: DeviceMesh) -> Tensor:
    """Clips the gradients of a model after `parallelize` to a norm over all ranks, which it returns."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    total = sum((g.float().square().sum() for g in grads), torch.zeros((), device=mesh.device_type))
    dist.all_reduce(total, group=mesh.get_group())
    norm = total.sqrt()
    for grad in grads:
        grad.mul_((limit / (norm + 1e-6)).clamp(max=1))
    return norm


@torch.no_grad()
def whole_state(model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """The parameters of the model that was spread, on every rank: gathered shards, and the experts of all ranks in order."""
    group, ranks = mesh.get_group(), mesh.size()
    away = {
        id(p)
        for m in model.modules()
        if isinstance(m, MoE)
        for p in (m.w_in, m.w_out, m.b_in, m.b_out)
        if p is not None
    }
    state = {}
    for name, value in model.named_parameters():
        if isinstance(value, DTensor):
            state[name] = value.full_tensor()
        elif id(value) in away:
            parts = [torch.empty_like(value) for _ in range(ranks)]
            dist.all_gather(parts, value.detach().contiguous(), group=group)
            state[name] = torch.cat(parts)
        else:
            state[name] = value.detach()
    return state
