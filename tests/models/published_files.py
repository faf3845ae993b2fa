"""A model's parameters under the names of its authors' released files, written out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mmkernels.layers import QFormerConfig

State = Mapping[str, Tensor]
ENDS = ("weight", "bias")
_EVA = {
    "norm1": "attention_norm", "attn.proj": "attention.out", "norm2": "mlp_norm", "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}  # fmt: skip
_BERT = {
    "attention.output.dense": "attention.out", "attention.output.LayerNorm": "attention_norm",
    "intermediate_query.dense": "query_ffn.up", "output_query.dense": "query_ffn.down",
    "output_query.LayerNorm": "query_norm",
}  # fmt: skip
_CROSS = {
    "crossattention.self.query": "cross.q", "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
}  # fmt: skip
_TEXT = {
    "intermediate.dense": "text_ffn.up", "output.dense": "text_ffn.down", "output.LayerNorm": "text_norm",
}  # fmt: skip


def both(state: State, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    """A submodule's weight, and its bias where it has one."""
    return ((f"{theirs}.{end}", state[f"{ours}.{end}"]) for end in ENDS if f"{ours}.{end}" in state)


def eva(state: State, at: str, patch: int) -> dict[str, Tensor]:
    """A tower; keys have no bias."""
    width, blocks = state["vision.class_token"].shape[0], _count(state, "vision.blocks.")
    out = {
        f"{at}cls_token": state["vision.class_token"].view(1, 1, width),
        f"{at}pos_embed": state["vision.positions"].unsqueeze(0),
        f"{at}patch_embed.proj.weight": state["vision.patch.weight"].view(width, 3, patch, patch),
        f"{at}patch_embed.proj.bias": state["vision.patch.bias"],
    }
    for i in range(blocks):
        block, ours = f"{at}blocks.{i}.", f"vision.blocks.{i}."
        out[f"{block}attn.qkv.weight"] = state[f"{ours}attention.qkv.weight"]
        out[f"{block}attn.q_bias"], _, out[f"{block}attn.v_bias"] = state[f"{ours}attention.qkv.bias"].chunk(
            3
        )
        for theirs, name in _EVA.items():
            out.update(both(state, f"{ours}{name}", f"{block}{theirs}"))
    return out


def bert(state: State, ours: str, at: str, c: QFormerConfig) -> dict[str, Tensor]:
    """A Q-Former without its queries, with text where the config has a vocabulary."""
    out = {f"{at}embeddings.position_ids": torch.arange(4).unsqueeze(0)}
    if c.vocab:
        out[f"{at}embeddings.word_embeddings.weight"] = state[f"{ours}embedding.weight"]
        out[f"{at}embeddings.position_embeddings.weight"] = state[f"{ours}position_embedding.weight"]
    image = {end: iter(state[f"{ours}image_kv.{end}"].split(c.hidden)) for end in ENDS}
    for end in ENDS:
        out[f"{at}embeddings.LayerNorm.{end}"] = state[f"{ours}norm.{end}"]
        for i in range(c.layers):
            layer, mine = f"{at}encoder.layer.{i}.", f"{ours}layers.{i}."
            qkv = state[f"{mine}attention.qkv.{end}"].chunk(3)
            for part, rows in zip(("query", "key", "value"), qkv, strict=True):
                out[f"{layer}attention.self.{part}.{end}"] = rows
            names = dict(_BERT)
            if i in c.crossing:
                names |= _CROSS
                for part in ("key", "value"):
                    out[f"{layer}crossattention.self.{part}.{end}"] = next(image[end])
            names |= _TEXT if c.vocab else {}
            out |= {f"{layer}{theirs}.{end}": state[f"{mine}{name}.{end}"] for theirs, name in names.items()}
    return out


def llama(state: State, at: str = "") -> dict[str, Tensor]:
    """A LLaMA, Vicuna or InternLM; with its low-rank updates, where it has some."""
    out = {
        f"{at}model.embed_tokens.weight": state["lm.embedding.weight"],
        f"{at}model.norm.weight": state["lm.norm.weight"], f"{at}lm_head.weight": state["lm.head.weight"],
    }  # fmt: skip
    for i in range(_count(state, "lm.blocks.")):
        layer, ours = f"{at}model.layers.{i}.", f"lm.blocks.{i}."
        out[f"{layer}self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
        for theirs, name in {
            "self_attn.o_proj": "attention.out", "mlp.down_proj": "mlp.down", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "mlp_norm",
        }.items():  # fmt: skip
            out.update(both(state, f"{ours}{name}", f"{layer}{theirs}"))
        for name, parts, tuned in (
            ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (0, 2)),
            ("mlp.up", ("mlp.gate_proj", "mlp.up_proj"), (0, 1)),
            ("mlp.down", ("mlp.down_proj",), (0,)),
        ):
            for key, rows in both(state, f"{ours}{name}", ""):
                for part, own in zip(parts, rows.chunk(len(parts)), strict=True):
                    out[f"{layer}{part}{key}"] = own
            for letter, end in (("A", "down"), ("B", "up")):
                joined = state.get(f"{ours}{name}.lora_{end}")
                for j, own in zip(tuned, () if joined is None else joined.chunk(len(tuned)), strict=False):
                    out[f"{layer}{parts[j]}.lora_{letter}.weight"] = own
    return out


def opt(state: State, at: str) -> dict[str, Tensor]:
    root = f"{at}model.decoder."
    out = {
        f"{root}embed_tokens.weight": state["lm.embedding.weight"], f"{at}lm_head.weight": state["lm.embedding.weight"],
        f"{root}embed_positions.weight": state["lm.position_embedding.weight"],
        **dict(both(state, "lm.norm", f"{root}final_layer_norm")),
    }  # fmt: skip
    for i in range(_count(state, "lm.blocks.")):
        layer, ours = f"{root}layers.{i}.", f"lm.blocks.{i}."
        for theirs, name in {
            "self_attn.out_proj": "attention.out", "fc1": "mlp.up", "fc2": "mlp.down",
            "self_attn_layer_norm": "attention_norm", "final_layer_norm": "mlp_norm",
        }.items():  # fmt: skip
            out.update(both(state, f"{ours}{name}", f"{layer}{theirs}"))
        for end in ENDS:
            for part, rows in zip("qkv", state[f"{ours}attention.qkv.{end}"].chunk(3), strict=True):
                out[f"{layer}self_attn.{part}_proj.{end}"] = rows
    return out


def t5(state: State, at: str) -> dict[str, Tensor]:
    """FlanT5 with an untied head; `shared` is written once more under each stack, as released files have it."""
    out = dict.fromkeys(
        (f"{at}shared.weight", f"{at}encoder.embed_tokens.weight", f"{at}decoder.embed_tokens.weight"),
        state["lm.embedding.weight"],
    ) | {f"{at}lm_head.weight": state["lm.head.weight"]}
    for stack in ("encoder", "decoder"):
        mine, root = f"lm.{stack}.", f"{at}{stack}."
        out[f"{root}final_layer_norm.weight"] = state[f"{mine}norm.weight"]
        out[f"{root}block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = state[
            f"{mine}relative_bias.weight"
        ]
        last = 2 if stack == "decoder" else 1
        for i in range(_count(state, f"{mine}blocks.")):
            layer, ours = f"{root}block.{i}.layer.", f"{mine}blocks.{i}."
            joined = [
                ("qkv", "0.SelfAttention.", "qkv"),
                ("mlp.up", f"{last}.DenseReluDense.", ("wi_0", "wi_1")),
            ]
            names = {
                "attention_norm": "0.layer_norm", "out": "0.SelfAttention.o", "mlp_norm": f"{last}.layer_norm",
                "mlp.down": f"{last}.DenseReluDense.wo",
            }  # fmt: skip
            if last == 2:
                joined.append(("cross_kv", "1.EncDecAttention.", "kv"))
                names |= {
                    "cross_norm": "1.layer_norm", "cross_q": "1.EncDecAttention.q", "cross_out": "1.EncDecAttention.o",
                }  # fmt: skip
            for name, inside, parts in joined:
                rows = state[f"{ours}{name}.weight"].chunk(len(parts))
                out |= {f"{layer}{inside}{p}.weight": t for p, t in zip(parts, rows, strict=True)}
            out |= {
                f"{layer}{theirs}.weight": state[f"{ours}{name}.weight"] for name, theirs in names.items()
            }
    return out


def _count(state: State, root: str) -> int:
    return 1 + max(int(name.removeprefix(root).split(".")[0]) for name in state if name.startswith(root))
