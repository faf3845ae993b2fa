"""A MoE-LLaVA of Phi or Qwen under its authors' names, without its tower, by hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.layers import MoE

State = dict[str, Tensor]
_PHI = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.out": ("self_attn.dense",),
    "attention_norm": ("input_layernorm",),
}  # fmt: skip
_QWEN = {
    "attention.qkv": ("attn.c_attn",), "attention.out": ("attn.c_proj",), "attention_norm": ("ln_1",), "mlp_norm": ("ln_2",),
}  # fmt: skip
_ENDS = ("weight", "bias")


def published(model: Any) -> State:
    qwen = model.config.lm.family == "qwen"
    root, layers = ("transformer.", "transformer.h.") if qwen else ("model.", "model.layers.")
    names = (("w2", "w1"), "c_proj") if qwen else (("fc1",), "fc2")
    state, out = {k: v.clone() for k, v in model.state_dict().items()}, {}
    for layer, block in enumerate(model.lm.blocks):
        ours, theirs = f"lm.blocks.{layer}.", f"{layers}{layer}."
        feed = _experts if isinstance(block.mlp, MoE) else _dense
        out |= feed(state, f"{ours}mlp.", f"{theirs}mlp.", names)
        for name, keys in (_QWEN if qwen else _PHI).items():
            for end in _ENDS:
                if f"{ours}{name}.{end}" in state:
                    rows = state.pop(f"{ours}{name}.{end}").chunk(len(keys))
                    out |= {f"{theirs}{key}.{end}": part for key, part in zip(keys, rows, strict=True)}
    embed, norm = ("wte", "ln_f") if qwen else ("embed_tokens", "final_layernorm")
    rest = {"lm.embedding": f"{root}{embed}", "lm.norm": f"{root}{norm}", "lm.head": "lm_head"}
    rest |= {
        f"projector.{n}": f"{root}mm_projector.image_spatial_proj.{i}"
        for n, i in (("input", 0), ("output", 2))
    }
    for name, key in rest.items():
        out |= {f"{key}.{end}": state.pop(f"{name}.{end}") for end in _ENDS if f"{name}.{end}" in state}
    assert all(key.startswith("vision.") for key in state)
    return out


def _dense(state: State, ours: str, at: str, names: tuple[tuple[str, ...], str]) -> State:
    out = {}
    for side, keys in (("up", names[0]), ("down", (names[1],))):
        for end in _ENDS:
            if f"{ours}{side}.{end}" in state:
                rows = state.pop(f"{ours}{side}.{end}").chunk(len(keys))
                out |= {f"{at}{key}.{end}": part for key, part in zip(keys, rows, strict=True)}
    return out


def _experts(state: State, ours: str, at: str, names: tuple[tuple[str, ...], str]) -> State:
    out = {f"{at}deepspeed_moe.gate.wg.weight": state.pop(f"{ours}gate.weight")}
    for side, keys in (("in", names[0]), ("out", (names[1],))):
        for end in _ENDS:
            if f"{ours}{end[0]}_{side}" not in state:
                continue
            for e, whole in enumerate(state.pop(f"{ours}{end[0]}_{side}")):
                expert = f"{at}deepspeed_moe.experts.deepspeed_experts.{e}."
                rows = whole.chunk(len(keys))
                out |= {f"{expert}{key}.{end}": part for key, part in zip(keys, rows, strict=True)}
    return out
