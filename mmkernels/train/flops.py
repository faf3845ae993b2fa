"""What a training step computes and keeps, counted on a model without memory: every op tells its work by its shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.primitives._op import OPS

Formula = Callable[[Any], float]


class Work(NamedTuple):
    """FLOPs of the forward pass and of a whole step, and bytes that the forward pass keeps for the backward one."""

    forward: float
    total: float
    kept: float


def _rows(x: Tensor, index: Tensor | None) -> int:
    return x.shape[0] if index is None else index.shape[0]


def _latent(a: Any) -> float:
    latents, media, width = a.latents.shape[0], a.media.shape[0], a.w_q.shape[0]
    rows = latents if a.latents.dim() == 2 else a.latents.shape[-2] * a.images
    own = 0 if a.w_self is None else a.w_self.numel()
    products = rows * (a.w_q.numel() + a.w_o.numel() + own) + media * a.w_kv.numel()
    return 2.0 * products + 4.0 * rows * (media / max(a.images, 1) + rows / max(a.images, 1)) * width


# Attention counts every key that its rows might see: causal rows see half of them, a cross-attention's one medium's.
FORWARD: dict[str, Formula] = {
    "interval_attention": lambda a: 4.0 * a.q.numel() * a.k.shape[1],
    "gated_cross_attention": lambda a: (
        2.0
        * a.x.numel()
        // a.x.shape[-1]
        * (a.w_q.numel() + a.w_o.numel() + 2 * a.k.shape[0] * a.w_q.shape[0])
    ),
    "gated_feed_forward": lambda a: 2.0 * a.x.numel() // a.x.shape[-1] * (a.w_in.numel() + a.w_out.numel()),
    "grouped_linear": lambda a: 2.0 * _rows(a.x, a.gather) * a.weight[0].numel(),
    "modality_linear": lambda a: 2.0 * _rows(a.x, a.gather) * a.w_text.numel(),
    "moe_ffn": lambda a: 2.0 * a.order.numel() * (a.w_in[0].numel() + a.w_out[0].numel()),
    "latent_attention": _latent,
    "slice_attention": lambda a: 4.0 * a.q.numel() * a.k.shape[0] / max(a.offsets.numel() - 1, 1),
    "slice_patch_embed": lambda a: 2.0 * a.patches.shape[0] * a.weight.numel(),
    "segment_lora": lambda a: 2.0 * a.x.shape[0] * (a.a[0].numel() + a.b[0].numel()),
}
FREE = {  # indices, copies and small tables: no products worth counting
    "media_intervals", "route_groups", "moe_route", "qformer_intervals", "region_pool", "splice_embeddings", "expert_mask",
    "image_positions", "causal_runs",
}  # fmt: skip
_BACKWARD = 2.0  # a gradient for each of a product's operands


def _counter(name: str) -> Callable[..., float]:
    """What the op `name` adds, from its arguments in the order of its schema."""
    base = name.removesuffix("_backward")
    formula = FORWARD.get(base)
    names = [arg.name for arg in getattr(torch.ops.mmkernels, name).default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> float:
        if formula is None:
            return 0.0
        given = SimpleNamespace(**dict(zip(names, args, strict=False)), **kwargs)
        return formula(given) * (_BACKWARD if base != name else 1.0)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def counters() -> dict[Any, Callable[..., float]]:
    """For `FlopCounterMode(custom_mapping=...)`: every op of ours."""
    return {getattr(torch.ops.mmkernels, name): _counter(name) for name in OPS}


def count(model: nn.Module, batch: dict[str, Any]) -> Work:
    """The work of one training step on `batch`, `model` and batch on `torch.device("meta")`; parameters are not kept anew."""
    kept: dict[int, Tensor] = {}
    own = {id(p) for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        base = x if x._base is None else x._base
        if id(base) not in own:
            kept[id(base)] = base
        return x

    mode = FlopCounterMode(display=False, custom_mapping=counters())
    with mode:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**batch).loss
        forward = float(mode.get_total_flops())
        bytes_kept = float(sum(x.numel() * x.element_size() for x in kept.values()))
        loss.backward()
    return Work(forward, float(mode.get_total_flops()), bytes_kept)
