"""Where released files of BLIP-2, InstructBLIP and XComposer keep everything but the language model."""

from __future__ import annotations

from typing import Any

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.models.qformer_stage1 import qformer_beside_queries

_BLOCK = {
    "attention_norm": "layer_norm1", r"attention\.qkv": "self_attn.qkv", r"attention\.out": "self_attn.projection",
    "mlp_norm": "layer_norm2", r"mlp\.up": "mlp.fc1", r"mlp\.down": "mlp.fc2",
}  # fmt: skip
_TOWER = Table(
    (
        Rule(r"patch\.weight", ("embeddings.patch_embedding.weight",), lambda t: t.flatten(1)),
        Rule(r"patch\.bias", ("embeddings.patch_embedding.bias",)),
        Rule("class_token", ("embeddings.class_embedding",), lambda t: t.flatten()),
        Rule("positions", ("embeddings.position_embedding",), lambda t: t.flatten(0, 1)),
        *(
            Rule(rf"blocks\.(\d+)\.{ours}\.(\w+)", (f"encoder.layers.{{0}}.{theirs}.{{1}}",))
            for ours, theirs in _BLOCK.items()
        ),
    )
)  # Hugging Face's copy of EVA


def blip2_table(model: Any, source: str) -> Table:
    """`source`: "lavis" (stage 2 and InstructBLIP), "xcomposer" or "huggingface"."""
    table = qformer_beside_queries(model.qformer, "lavis_instruct" if source == "lavis" else source)
    if source == "huggingface":
        table += _TOWER.under("vision.", "vision_model.")
        return table + Table(renames(ln_vision="vision_model.post_layernorm", proj="language_projection"))
    table += model.vision.published("eva").under("vision.", "visual_encoder.")
    family = getattr(model.config.lm, "family", "t5")
    of = "internlm" if source == "xcomposer" else {"opt": "opt", "t5": "t5"}.get(family, "llm")
    table += Table(renames(proj=f"{of}_proj"))
    flags = tuple(
        Rule(f"flag_{end}", (f"flag_image_{end}",), lambda t: t.flatten()) for end in ("start", "end")
    )
    table += Table((*renames(ln_vision="ln_vision"), *flags))
    frozen = () if source == "xcomposer" else (r"vision\..*", r"lm\..*")
    return table + Table((), absent=frozen)
