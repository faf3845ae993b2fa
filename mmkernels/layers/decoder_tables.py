"""Where published language models keep the decoder's parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.layers._published import Rule, Table


@dataclass(frozen=True)
class Layout:
    """One family's key names: the embedding, the layers (under `layers`, by number), the final norm and the head."""

    embedding: str
    layers: str
    norm: str
    head: tuple[str, ...]  # newer files of some families have a second name for it
    inside: tuple[tuple[str, str], ...]  # our submodule of a block -> theirs
    qkv: tuple[str, ...]  # theirs, joined; a single one is [q; k; v] unless `heads_first`
    up: tuple[str, ...]
    heads_first: bool = False  # rows of qkv are [q; k; v] head by head
    positions: str = ""  # the table of learned positions, where there is one
    pairs: bool = False  # rotary turns neighbouring channels: rows of q and k are brought into halves


LAYOUTS = {
    "mpt": Layout(
        embedding="transformer.wte", layers="transformer.blocks", norm="transformer.norm_f", head=("lm_head",),
        inside=(
            ("attention_norm", "norm_1"), (r"attention\.out", "attn.out_proj"), (r"attention\.q_norm", "attn.q_ln"),
            (r"attention\.k_norm", "attn.k_ln"), ("mlp_norm", "norm_2"), (r"mlp\.down", "ffn.down_proj"),
        ),
        qkv=("attn.Wqkv",), up=("ffn.up_proj",),
    ),
    "gpt_neox": Layout(
        embedding="gpt_neox.embed_in", layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm",
        head=("embed_out", "lm_head"),
        inside=(
            ("attention_norm", "input_layernorm"), (r"attention\.out", "attention.dense"),
            ("mlp_norm", "post_attention_layernorm"), (r"mlp\.down", "mlp.dense_4h_to_h"),
        ),
        qkv=("attention.query_key_value",), up=("mlp.dense_h_to_4h",), heads_first=True,
    ),
    "llama": Layout(
        embedding="model.embed_tokens", layers="model.layers", norm="model.norm", head=("lm_head",),
        inside=(
            ("attention_norm", "input_layernorm"), (r"attention\.out", "self_attn.o_proj"),
            ("mlp_norm", "post_attention_layernorm"), (r"mlp\.down", "mlp.down_proj"),
        ),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), up=("mlp.gate_proj", "mlp.up_proj"),
    ),
    "opt": Layout(
        embedding="model.decoder.embed_tokens", layers="model.decoder.layers", norm="model.decoder.final_layer_norm",
        head=("lm_head",),
        inside=(
            ("attention_norm", "self_attn_layer_norm"), (r"attention\.out", "self_attn.out_proj"),
            ("mlp_norm", "final_layer_norm"), (r"mlp\.down", "fc2"),
        ),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), up=("fc1",),
        positions="model.decoder.embed_positions",
    ),
    "qwen": Layout(
        embedding="transformer.wte", layers="transformer.h", norm="transformer.ln_f", head=("lm_head",),
        inside=(
            ("attention_norm", "ln_1"), (r"attention\.out", "attn.c_proj"), ("mlp_norm", "ln_2"),
            (r"mlp\.down", "mlp.c_proj"),
        ),
        qkv=("attn.c_attn",), up=("mlp.w2", "mlp.w1"),  # theirs is w1 x * silu(w2 x)
    ),
    "phi": Layout(
        embedding="model.embed_tokens", layers="model.layers", norm="model.final_layernorm", head=("lm_head",),
        inside=(
            ("attention_norm", "input_layernorm"), (r"attention\.out", "self_attn.dense"), (r"mlp\.down", "mlp.fc2"),
        ),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), up=("mlp.fc1",),
    ),
    "persimmon": Layout(
        embedding="model.embed_tokens", layers="model.layers", norm="model.final_layernorm", head=("lm_head",),
        inside=(
            ("attention_norm", "input_layernorm"), (r"attention\.out", "self_attn.dense"),
            (r"attention\.q_norm", "self_attn.q_layernorm"), (r"attention\.k_norm", "self_attn.k_layernorm"),
            ("mlp_norm", "post_attention_layernorm"), (r"mlp\.down", "mlp.dense_4h_to_h"),
        ),
        qkv=("self_attn.query_key_value",), up=("mlp.dense_h_to_4h",), heads_first=True,
    ),
    "lavin": Layout(  # Meta's own files of LLaMA
        embedding="tok_embeddings", layers="layers", norm="norm", head=("output",),
        inside=(
            ("attention_norm", "attention_norm"), (r"attention\.out", "attention.wo"), ("mlp_norm", "ffn_norm"),
            (r"mlp\.down", "feed_forward.w2"),
        ),
        qkv=("attention.wq", "attention.wk", "attention.wv"), up=("feed_forward.w1", "feed_forward.w3"), pairs=True,
    ),
}  # fmt: skip


def layer_names(source: str, layer: int) -> tuple[str, tuple[str, ...], str]:
    """A layer's place in a family's files, and their names in it of what makes `mlp.up` and of `mlp.down`."""
    layout = LAYOUTS[source]
    return f"{layout.layers}.{layer}.", layout.up, dict(layout.inside)[r"mlp\.down"]


def embedding_rules(key: str, vocab: int, special: tuple[int, ...]) -> tuple[Rule, ...]:
    """The embedding's first `vocab` rows (published tables are often padded), and the rows that live apart."""
    return (
        Rule(r"embedding\.weight", (key,), lambda t: t[:vocab]),
        Rule("special_rows", (key,), lambda t: t[[i for i in special if i < len(t)]]),
    )


def decoder_table(
    source: str, *, heads: int, kv_heads: int | None = None, vocab: int, special: tuple[int, ...], tied: bool
) -> Table:
    """The whole table of one family, for a decoder with these sizes."""
    layout = LAYOUTS[source]
    at, theirs = r"blocks\.(\d+)\.", f"{layout.layers}.{{0}}."

    def joined(ours: str, names: tuple[str, ...], heads_first: bool = False, pairs: bool = False) -> Rule:
        view = (lambda t: heads_last(t, heads)) if heads_first else None
        view = (lambda t: halves(t, heads, kv_heads or heads)) if pairs else view
        return Rule(rf"{at}{ours}\.(\w+)", tuple(f"{theirs}{name}.{{1}}" for name in names), view)

    def rows(t: Tensor) -> Tensor:
        return t[:vocab]

    return Table(
        (
            *embedding_rules(f"{layout.embedding}.weight", vocab, special),
            Rule(r"position_embedding\.weight", (f"{layout.positions}.weight",)),
            *(joined(ours, (name,)) for ours, name in layout.inside),
            joined(r"attention\.qkv", layout.qkv, layout.heads_first, layout.pairs),
            joined(r"mlp\.up", layout.up),
            Rule(r"norm\.(\w+)", (f"{layout.norm}.{{0}}",)),
            *(Rule(r"head\.(\w+)", (f"{head}.{{0}}",), rows) for head in layout.head),
        ),
        ignored=(
            r".*\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)",  # constants
            r"rope\.freqs|layers\.\d+\.attention\.gate",
            *(rf"{head}\.weight" for head in layout.head if tied),
        ),
    )


def heads_last(rows: Tensor, heads: int) -> Tensor:
    """[H (3 D), ...] -> [3 H D, ...]: from q, k, v of each head to all q, all k, all v."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def halves(rows: Tensor, heads: int, kv_heads: int) -> Tensor:
    """All q, all k, all v of `[(H + 2 G) D, ...]`: from pairs (2 r, 2 r + 1) of q and k to pairs (r, r + D / 2)."""
    width = rows.shape[0] // (heads + 2 * kv_heads)
    turned, v = rows.split(((heads + kv_heads) * width, kv_heads * width))
    turned = turned.unflatten(0, (heads + kv_heads, width // 2, 2)).transpose(1, 2).flatten(0, 2)
    return torch.cat([turned, v])
