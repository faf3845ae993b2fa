"""Where published files keep a vision tower's parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.decoder_tables import heads_last


def _table(
    top: dict[str, str],
    blocks: str,
    inside: dict[str, str],
    qkv: tuple[str, ...],
    within: str,
    unused: tuple[str, ...],
    view: Callable[[Tensor], Tensor] | None = None,
) -> Table:
    """A CLIP layout: `top` and `inside` (a block under `blocks`) map our names to theirs; keys like `unused` are skipped.

    `view` brings the joined rows of queries, keys and values into our order.
    """
    patch = (
        Rule(r"patch\.weight", (f"{top['patch']}.weight",), lambda t: t.flatten(1)),
        Rule(r"patch\.bias", (f"{top['patch']}.bias",)),
    )
    whole = [Rule(ours, (top[ours],)) for ours in ("class_token", "positions") if ours in top]
    norms = [
        Rule(rf"{ours}\.(\w+)", (f"{top[ours]}.{{0}}",)) for ours in ("pre_norm", "post_norm") if ours in top
    ]
    joined = Rule(
        r"blocks\.(\d+)\.attention\.qkv\.(\w+)", tuple(f"{blocks}.{{0}}.{name}{{1}}" for name in qkv), view
    )
    rest = [
        Rule(rf"blocks\.(\d+)\.{ours}\.(\w+)", (f"{blocks}.{{0}}.{name}.{{1}}",))
        for ours, name in inside.items()
    ]
    return Table((*patch, *whole, *norms, joined, *rest), ignored=unused, within=within)


HUGGINGFACE = _table(
    {
        "patch": "embeddings.patch_embedding", "class_token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm", "post_norm": "post_layernorm",
    },
    "encoder.layers",
    {
        "attention_norm": "layer_norm1", r"attention\.out": "self_attn.out_proj", "mlp_norm": "layer_norm2",
        r"mlp\.up": "mlp.fc1", r"mlp\.down": "mlp.fc2",
    },
    ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    within="vision_model.",
    unused=(r"post_layernorm\..*", r"embeddings\.position_ids", r"head\..*"),  # SigLIP's head pools
)  # fmt: skip
_RESBLOCK = {
    "attention_norm": "ln_1", r"attention\.out": "attn.out_proj", "mlp_norm": "ln_2", r"mlp\.up": "mlp.c_fc",
    r"mlp\.down": "mlp.c_proj",
}  # fmt: skip
OPEN_CLIP = _table(
    {
        "patch": "conv1", "class_token": "class_embedding", "positions": "positional_embedding", "pre_norm": "ln_pre",
        "post_norm": "ln_post",
    },
    "transformer.resblocks",
    _RESBLOCK,
    ("attn.in_proj_",),
    within="visual.",
    unused=(r"ln_post\..*", "proj"),
)  # fmt: skip


def qwen_vl_table(heads: int) -> Table:
    """Qwen-VL's file: the rows of a block's `in_proj` are q, k, v of each head; resampler, norm and projection lie beside."""
    return _table(
        {"patch": "conv1", "positions": "positional_embedding", "pre_norm": "ln_pre"},
        "transformer.resblocks",
        _RESBLOCK,
        ("attn.in_proj.",),
        within="transformer.visual.",
        unused=(r"attn_pool\..*", r"ln_post\..*", "proj"),
        view=lambda rows: heads_last(rows, heads),
    )
