"""Experts under the name "mmkernels": chosen rows sorted by expert without a sort, two grouped products, one ordered sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.primitives.grouped_linear import grouped_linear
from mmkernels.primitives.routing import route_groups

FEW = 16  # rows of a decoding step on a CPU


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `ExpertsInterface` calls: `sum_k w[t, k] down(gate(up(x[t])))` over the experts chosen for token t.

    An id equal to the number of experts (a token of another rank) gives nothing. x `[T, C]`, index and weights `[T, K]`.
    """
    tokens, k = top_k_index.shape
    if hidden_states.device.type == "cpu" and _theirs(module) and not torch.compiler.is_compiling():
        if tokens * k <= FEW and not torch.is_grad_enabled() and _bare(module, hidden_states):
            return _few(module, hidden_states, top_k_index, top_k_weights)
        if _torch_wins(module, hidden_states):
            return grouped_mm(module, hidden_states, top_k_index, top_k_weights)
    groups = route_groups(top_k_index.reshape(-1).int(), module.num_experts)
    place = groups.order.clamp(min=0)  # rows of no expert stand last and are read by nothing
    up = module.gate_up_proj if module.has_gate else module.up_proj
    up_bias = (
        (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None
    )
    down_bias = module.down_proj_bias if module.has_bias else None
    down = module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    swiglu = gates_by_silu(module)
    h = grouped_linear(
        hidden_states,
        up,
        groups.counts,
        gather=place // k,
        bias=up_bias,
        activation="swiglu" if swiglu else None,
    )
    if not swiglu:
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    weights = top_k_weights.reshape(-1)[place.long()]
    normed = getattr(module, "has_post_expert_norm", False)
    y = grouped_linear(
        h, down, groups.counts, scatter=groups.order, bias=down_bias, row_scale=None if normed else weights
    )
    if normed:
        y = module.post_expert_norm(y) * top_k_weights.reshape(-1, 1)
    return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def gates_by_silu(module: Any) -> bool:
    """Whether the gate is `silu(first half) * second half`, which the product's epilogue computes."""
    if hasattr(module, "silu"):
        return module.silu
    return module.has_gate and module.is_concatenated and _default_gate(type(module), type(module.act_fn))


def _default_gate(experts: type, activation: type) -> bool:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import _default_apply_gate

    return getattr(experts, "_apply_gate", None) is _default_apply_gate and activation in (
        nn.SiLU,
        type(ACT2FN["silu"]),
    )


def _theirs(module: Any) -> bool:
    return isinstance(module, nn.Module)


def grouped_mm(module: Any, *rows: Tensor) -> Tensor:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(module, *rows)


def _torch_wins(module: Any, x: Tensor) -> bool:
    """torch's grouped product, on a CPU and where it takes the operands: measured to be the faster there."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype == module.down_proj.dtype and x.dtype in dtypes and not torch.is_autocast_enabled("cpu")


def _bare(module: Any, x: Tensor) -> bool:
    """SwiGLU experts of one rank without biases and norms, in one dtype."""
    more = (
        module.has_bias
        or getattr(module, "has_post_expert_norm", False)
        or getattr(module, "_is_expert_parallel", False)
    )
    return (
        not more
        and x.dtype == module.down_proj.dtype
        and not torch.is_autocast_enabled("cpu")
        and gates_by_silu(module)
    )


def _few(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Tokens that are being decoded: the chosen experts' weights are read once each, and next to nothing else is done."""
    tokens, k = index.shape
    up, down = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        up, down = up.mT, down.mT
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(index.flatten().tolist()):
        places.setdefault(expert, []).append(place)
    parts = x.new_empty(tokens * k, down.shape[-1])
    for expert, own in places.items():
        rows = x if tokens == 1 else x[[place // k for place in own]]
        gate, value = (rows @ up[expert]).chunk(2, -1)
        y = nn.functional.silu(gate).mul_(value) @ down[expert]
        if tokens == 1:
            parts[own[0]] = y[0]
        else:
            parts[own] = y
    return (parts.view(tokens, k, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
