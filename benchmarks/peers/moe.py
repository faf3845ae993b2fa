"""What else a user could write for a mixture of experts: DeepSpeed's dense dispatch, and torch's grouped product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.moe.cases import Gates, gating
from mmkernels.primitives._case import Inputs, Unsuited
from mmkernels.primitives.grouped_linear.reference import activate

MOST = 16  # experts: dense dispatch to more is not what anybody writes

Run = Callable[[], Tensor]


def _dense(gates: Gates, experts: int) -> Tensor:
    """Weights [T, E, places]."""
    each = F.one_hot(torch.where(gates.kept, gates.experts, experts), experts + 1)[..., :-1]
    slot = F.one_hot(gates.slots.clamp(0, gates.capacity - 1), gates.capacity)
    each, slot = (x.to(gates.weights.dtype) for x in (each, slot))
    return sum(
        torch.einsum("s,se,sc->sec", gates.weights[:, j], each[:, j], slot[:, j])
        for j in range(each.shape[1])
    )  # type: ignore[return-value]


def einsum(x: Inputs) -> Run:
    """As DeepSpeed, which MoE-LLaVA trains with: products with one-hot tensors send tokens out and bring them back."""
    experts = len(x["w_in"])
    if experts > MOST or not len(x["x"]) or x["capacity"] == 0:
        raise Unsuited(
            f"{experts} experts, {len(x['x'])} tokens: nobody dispatches these by one-hot products"
        )

    def run() -> Tensor:
        gates = gating(x)
        combine = _dense(gates, experts)
        a = torch.einsum("sec,sm->ecm", combine.bool().to(x["x"].dtype), x["x"])
        h = torch.einsum("ecm,enm->ecn", a, x["w_in"])
        h = h if x["b_in"] is None else h + x["b_in"].unsqueeze(1)
        y = torch.einsum("ecf,emf->ecm", activate(h, x["activation"] or ""), x["w_out"])
        y = y if x["b_out"] is None else y + x["b_out"].unsqueeze(1)
        return torch.einsum("sec,ecm->sm", combine.to(y.dtype), y)

    return run


def grouped_mm(x: Inputs) -> Run:
    """As transformers' grouped experts: a sort by expert, torch's grouped products, the sort undone, a sum over choices."""
    (tokens, k), experts = (len(x["x"]), x["k"]), len(x["w_in"])
    bytes_of = x["x"].element_size()
    if not tokens or any(bytes_of * n % 16 for n in (*x["w_in"].shape[1:], *x["w_out"].shape[1:])):
        raise Unsuited("torch's grouped product wants rows, each a multiple of 16 bytes")

    def run() -> Tensor:
        gates = gating(x)
        ids = torch.where(gates.kept, gates.experts, experts - 1).flatten()  # a dropped route weighs 0
        order = ids.argsort()
        ends = torch.bincount(ids, minlength=experts).cumsum(0).int()
        h = F.grouped_mm(x["x"][order // k], x["w_in"].transpose(1, 2), offs=ends)
        h = h if x["b_in"] is None else h + x["b_in"][ids[order]]
        y = F.grouped_mm(activate(h, x["activation"] or ""), x["w_out"].transpose(1, 2), offs=ends)
        y = y if x["b_out"] is None else y + x["b_out"][ids[order]]
        y = y * gates.weights.flatten()[order].unsqueeze(1)
        back = torch.empty_like(order).index_put((order,), torch.arange(tokens * k, device=order.device))
        return y[back].view(tokens, k, -1).sum(1).to(x["x"].dtype)

    return run


PEERS = {"einsum": einsum, "grouped_mm": grouped_mm}
