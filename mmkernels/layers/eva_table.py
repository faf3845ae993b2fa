"""Where EVA-CLIP's files keep the tower's parameters: as BLIP-2 and LLaMA-VID release it, and inside of CogVLM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.positions import interpolate_positions

_BLOCK = {
    "attention_norm": "norm1", r"attention\.out": "attn.proj", "mlp_norm": "norm2", r"mlp\.up": "mlp.fc1",
    r"mlp\.down": "mlp.fc2",
}  # fmt: skip


def _qkv_bias(joined: Tensor) -> Tensor:
    """Keys have none: one bias for all keys would shift a row's scores alike, and softmax forgets it."""
    q, v = joined.chunk(2)
    return torch.cat([q, torch.zeros_like(q), v])


def _stretched(table: Tensor, patches: int) -> Tensor:
    """The class token's position and those of `patches` patches, from a file of another image size as the authors make them."""
    sides = math.isqrt(max(len(table) - 1, 0)), math.isqrt(patches)
    if [side**2 for side in sides] != [len(table) - 1, patches] or 0 in sides:
        return table  # it will be refused by its shape
    return torch.cat([table[:1], interpolate_positions(table[1:], (sides[1], sides[1]))])


def eva_table(patches: int) -> Table:
    """For a tower of `patches` patches, which may be more than those of the file."""
    positions = Rule("positions", ("pos_embed",), lambda t: _stretched(t.flatten(0, 1), patches))
    return Table((*_EVA.rules, positions), ignored=_EVA.ignored)


_EVA = Table(
    (
        Rule(r"patch\.weight", ("patch_embed.proj.weight",), lambda t: t.flatten(1)),
        Rule(r"patch\.bias", ("patch_embed.proj.bias",)),
        Rule("class_token", ("cls_token",), lambda t: t.flatten()),
        Rule(r"blocks\.(\d+)\.attention\.qkv\.weight", ("blocks.{0}.attn.qkv.weight",)),
        Rule(
            r"blocks\.(\d+)\.attention\.qkv\.bias",
            ("blocks.{0}.attn.q_bias", "blocks.{0}.attn.v_bias"),
            _qkv_bias,
        ),
        *(
            Rule(rf"blocks\.(\d+)\.{ours}\.(\w+)", (f"blocks.{{0}}.{theirs}.{{1}}",))
            for ours, theirs in _BLOCK.items()
        ),
    ),
    ignored=(r"(norm|fc_norm|head)\..*", r"blocks\.39\..*"),  # what follows the block that is read
)
_COGVLM_BLOCK = {
    "attention_norm": "input_layernorm", r"attention\.qkv": "attention.query_key_value",
    r"attention\.out": "attention.dense", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip


def _cogvlm(within: str, up: str, down: str, *stem: Rule) -> Table:
    """The tower in CogVLM's files: `stem` in front of the blocks, which are named alike."""
    inside = {**_COGVLM_BLOCK, r"mlp\.up": f"mlp.{up}", r"mlp\.down": f"mlp.{down}"}
    blocks = (
        Rule(rf"blocks\.(\d+)\.{ours}\.(\w+)", (f"transformer.layers.{{0}}.{theirs}.{{1}}",))
        for ours, theirs in inside.items()
    )
    return Table((*stem, *blocks), within=within)


def _patch(at: str) -> tuple[Rule, Rule]:
    return (
        Rule(r"patch\.weight", (f"{at}proj.weight",), lambda t: t.flatten(1)),
        Rule(r"patch\.bias", (f"{at}proj.bias",)),
    )


COGVLM = _cogvlm(
    "model.vision.", "fc1", "fc2",
    *_patch("patch_embedding."),
    Rule("class_token", ("patch_embedding.cls_embedding",), lambda t: t.flatten()),
    Rule("positions", ("patch_embedding.position_embedding.weight",)),
)  # fmt: skip
COGVLM_SAT = _cogvlm(
    "mixins.eva.vit_model.", "dense_h_to_4h", "dense_4h_to_h",
    *_patch("mixins.patch_embedding."),
    Rule("class_token", ("transformer.word_embeddings.weight",), lambda t: t[0]),
    Rule("positions", ("transformer.position_embeddings.weight",)),
)  # fmt: skip


def eva_e_table(patches: int) -> Table:
    """EVA-E: Hugging Face's layout, that of CogVLM's training code, or EVA-CLIP's own, whichever a file has."""
    return Table(
        COGVLM.rules + COGVLM_SAT.rules + eva_table(patches).rules,
        ignored=(r"(norm|fc_norm|head)\..*", r"blocks\.63\..*", r"(linear_proj|conv)\..*", "boi", "eoi"),
        within=COGVLM.within,
    )
