"""Layers of theirs whose own forward is replaced: what the attention and experts interfaces do not reach.

Each function takes the forward that stood before and gives the one to stand instead, with the same arguments and results; it
returns to the former where a case is not its own (adapters on a weight that would be read past them, dropout, odd masks).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.hf import _masks
from mmkernels.integrations.hf._attention import REASONS, attend, attention
from mmkernels.integrations.hf._experts import experts
from mmkernels.integrations.hf._kept import kept
from mmkernels.integrations.hf._masks import Seen
from mmkernels.ops.gated_cross_attention import gated_cross_attention

Forward = Callable[..., Any]
FEW = 128  # rows of a segment, on average


def _plain(*layers: nn.Module) -> bool:
    """Linear maps that are no more than their weight: no adapter, no quantisation, no hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return all(
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not any(getattr(layer, h) for h in hooks)
        for layer in layers
    )


def idefics_gated_layer(original: Forward) -> Forward:
    """`IdeficsGatedCrossAttentionLayer`: norm, attention to the images a token sees, and gate as one op."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cross, images, gate = self.cross_attn, image_hidden_states, cross_attention_gate
        found = None
        fits = (
            not (self.training and self.config)
            and not cross.qk_layer_norms
            and _plain(cross.q_proj, cross.o_proj)
        )
        if fits and not torch.compiler.is_compiling() and None not in (images, gate, image_attention_mask):
            found = _masks.seen(image_attention_mask, hidden_states.shape[1], images.shape[1])  # type: ignore[arg-type, union-attr]
        if (
            found is None
            or found.reason
            or found.order is not None
            or len(found.runs) > 1
            or any(v is not None for v in _caches(kwargs))
        ):
            return original(
                self, hidden_states, attention_mask, image_hidden_states=images, image_attention_mask=image_attention_mask,
                cross_attention_gate=gate, **kwargs,
            )  # fmt: skip
        lo, hi = _flat(found, gate, images.shape[1])  # type: ignore[arg-type, union-attr]
        assert images is not None
        k, v = kept(self, images, (cross.k_proj.weight, cross.v_proj.weight), lambda: _media(cross, images))
        x = gated_cross_attention(
            hidden_states, k, v, lo, hi, norm_weight=self.input_layernorm.weight, norm_bias=None,
            w_q=cross.q_proj.weight, w_o=cross.o_proj.weight, gate=self.alpha_cross_attn.flatten(), heads=cross.num_heads,
            norm="rms", eps=self.input_layernorm.variance_epsilon,
        )  # fmt: skip
        return x + self.act_dense(self.alpha_dense) * self.mlp(self.post_attention_layernorm(x))

    return forward


def _media(cross: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (layer(images).view(-1, cross.num_heads, cross.head_dim) for layer in (cross.k_proj, cross.v_proj))
    return k, v


def _caches(kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return kwargs.get("cache"), kwargs.get("past_key_values")


def _flat(found: Seen, gate: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Runs over the flat keys of the batch; rows whose gate is 0 see nothing."""
    lo, hi = found.runs[0]
    hi = torch.where(gate == 0, lo, hi)
    base = torch.arange(lo.shape[0], dtype=torch.int32, device=lo.device).unsqueeze(1) * keys
    return (lo + base).flatten(), (hi + base).flatten()


def idefics_resampler(original: Forward) -> Forward:
    """`IdeficsPerceiverResampler`: generation asks for the same images at every token; once is enough."""

    def forward(self: Any, context: Tensor) -> Tensor:
        return kept(self, context, self.parameters(), lambda: original(self, context))

    return forward


def idefics_perceiver_attention(original: Forward) -> Forward:
    """`IdeficsPerceiverAttention`: the same projections, attention without a matrix of scores."""

    def forward(self: Any, context: Tensor, latents: Tensor) -> Tensor:
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        both = torch.cat([context, latents], dim=-2)
        q, k, v = (
            layer(x).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
            for layer, x in ((self.q_proj, latents), (self.k_proj, both), (self.v_proj, both))
        )
        if self.qk_layer_norms:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        out, _ = attention(self, q, k, v, None, scaling=self.qk_scale, is_causal=False)
        return self.output_proj(out.flatten(2))

    return forward


def mllama_cross_layer(original: Forward) -> Forward:
    """`MllamaCrossAttentionDecoderLayer` without its leak: a token before every image gets nothing from any.

    As published such a token attends to all images, those after it too: the mask of its row is set to 0, which hides nothing,
    and only the feed-forward half is masked (transformers issue 39379).
    """

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.get("full_text_row_masked_out_mask", args[3] if len(args) > 3 else None)
        if rows is None:
            return original(self, hidden_states, *args, **kwargs)
        sees = rows[:, 0] != 0
        hook = self.cross_attn.register_forward_hook(
            lambda module, inputs, output: (torch.where(sees, output[0], 0), *output[1:])
        )
        try:
            return original(self, hidden_states, *args, **kwargs)
        finally:
            hook.remove()

    return forward


def packed_vision(original: Forward) -> Forward:
    """Vision attention over packed images (Qwen2-VL and its heirs): all segments in one call instead of one call each."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        rows = hidden_states.shape[0]
        if _few(hidden_states, cu_seqlens):
            return original(self, hidden_states, cu_seqlens, position_embeddings, *args, **kwargs)
        q, k, v = self.qkv(hidden_states).view(rows, 3, self.num_heads, -1).unbind(1)
        if position_embeddings is not None:
            turn = vars(sys.modules[type(self).__module__])["apply_rotary_pos_emb_vision"]
            q, k = turn(q, k, *position_embeddings)
        found = _segments(cu_seqlens, rows)
        p = getattr(self, "attention_dropout", 0.0) if self.training else 0.0
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = attend(q, k, v, found, p, getattr(self, "scaling", None))
        return self.proj(out.reshape(rows, -1))

    return forward


def _few(x: Tensor, cu_seqlens: Tensor) -> bool:
    """A few large segments on a CPU in float32: torch's own attention, called for each, is measured to be the faster."""
    large = x.shape[0] > FEW * (cu_seqlens.shape[0] - 1)
    return (
        large and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )


def _segments(cu_seqlens: Tensor, rows: int) -> Seen:
    """Every row sees its segment; kept with the tensor, which all layers share."""
    inference = torch.is_inference_mode_enabled()
    compiling = torch.compiler.is_compiling()
    stamp = (
        None if compiling else (rows, inference, None if cu_seqlens.is_inference() else cu_seqlens._version)
    )
    before, found = (None, None) if compiling else getattr(cu_seqlens, "_mmkernels_seen", (None, None))
    if found is None or before != stamp:
        edges = cu_seqlens.to(torch.int32)
        segment = torch.searchsorted(
            edges, torch.arange(rows, dtype=torch.int32, device=edges.device), right=True
        )
        found = Seen(((edges[segment - 1].unsqueeze(0), edges[segment].unsqueeze(0)),))
        if not compiling:
            cu_seqlens._mmkernels_seen = (stamp, found)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def aria_cross_attention(original: Forward) -> Forward:
    """`AriaCrossAttention`: torch's multi-head module asked for its weights, which nobody reads."""

    def forward(
        self: Any, key_value_states: Tensor, hidden_states: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        heads, inner = self.num_heads, self.multihead_attn
        images, queries, patches = len(hidden_states), hidden_states.shape[1], key_value_states.shape[1]
        mask = None
        if attn_mask is not None:
            blocked = attn_mask.view(images, heads, queries, patches)
            if attn_mask.dtype != torch.bool or not bool((blocked == blocked[:, :1]).all()):
                REASONS["a mask for every head of its own"] += 1
                return original(self, key_value_states, hidden_states, attn_mask=attn_mask)
            mask = ~blocked[:, :1]
        if not _plain(self.q_proj, self.k_proj, self.v_proj) or inner.in_proj_weight is None or inner.dropout:
            return original(self, key_value_states, hidden_states, attn_mask=attn_mask)
        context = self.layer_norm_kv(key_value_states)
        given = (self.q_proj(self.layer_norm(hidden_states)), self.k_proj(context), self.v_proj(context))
        biases = inner.in_proj_bias.chunk(3) if inner.in_proj_bias is not None else (None,) * 3
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, w, b in zip(given, inner.in_proj_weight.chunk(3), biases, strict=True)
        )
        out, _ = attention(self, q, k, v, mask, is_causal=False)
        return self.dropout(self.linear(inner.out_proj(out.flatten(2))))

    return forward


def aria_experts(original: Forward) -> Forward:
    """`AriaExperts` where it has its own loop over experts (transformers before 5.18)."""

    def forward(self: Any, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        index, weights = self.route_tokens_to_experts(router_logits)
        view = SimpleNamespace(
            gate_up_proj=self.fc1.weight, down_proj=self.fc2.weight, num_experts=self.config.moe_num_experts,
            has_gate=True, has_bias=False, is_transposed=True, has_post_expert_norm=False, _is_expert_parallel=False,
            silu=True,
        )  # fmt: skip
        return experts(view, hidden_states, index, weights)

    return forward
