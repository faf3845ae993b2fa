"""Experts under the name "mmkernels": chosen rows sorted by expert without a sort, two grouped products, one ordered sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmkernels.primitives.grouped_linear import grouped_linear
from mmkernels.primitives.routing import route_groups


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `ExpertsInterface` calls: `sum_k w[t, k] down(gate(up(x[t])))` over the experts chosen for token t.

    An id equal to the number of experts (a token of another rank) gives nothing. x `[T, C]`, index and weights `[T, K]`.
    """
    tokens, k = top_k_index.shape
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
    normed = module.has_post_expert_norm
    y = grouped_linear(
        h, down, groups.counts, scatter=groups.order, bias=down_bias, row_scale=None if normed else weights
    )
    if normed:
        y = module.post_expert_norm(y) * top_k_weights.reshape(-1, 1)
    return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def gates_by_silu(module: Any) -> bool:
    """Whether the gate is `silu(first half) * second half`, which the product's epilogue computes."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import _default_apply_gate

    if hasattr(module, "silu"):
        return module.silu
    if not (module.has_gate and module.is_concatenated):
        return False
    plain = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    return plain and isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"])))
