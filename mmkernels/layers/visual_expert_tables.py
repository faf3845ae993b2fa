"""Where CogVLM's files keep a layer's parameters: Hugging Face's of both releases, and SAT's of the training code."""

from __future__ import annotations

from mmkernels.layers._published import Rule, Table, renames

SOURCES = ("cogvlm", "cogvlm2", "cogvlm_sat")

_EITHER = r"\.(weight|bias)"


def _rule(ours: str, *theirs: str) -> Rule:
    return Rule(ours + _EITHER, tuple(f"{name}.{{0}}" for name in theirs))


def attention_table(source: str, layer: int) -> Table:
    if source == "cogvlm_sat":
        text, vision = f"transformer.layers.{layer}.attention.", "mixins.rotary.vision_"
        return Table(
            (
                _rule(r"qkv\.text", f"{text}query_key_value"),
                _rule(r"out\.text", f"{text}dense"),
                _rule(r"qkv\.vision", f"{vision}query_key_value_list.{layer}"),
                _rule(r"out\.vision", f"{vision}dense_list.{layer}"),
            )
        )
    parts = {"qkv": "query_key_value", "out": "dense"}
    names = {"text": "language", "vision": "vision"}
    return Table(
        tuple(
            _rule(rf"{ours}\.{modality}", f"{name}_expert_{theirs}")
            for ours, theirs in parts.items()
            for modality, name in names.items()
        ),
        ignored=(r"rotary_emb\.inv_freq",),
    )


def mlp_table(source: str, layer: int) -> Table:
    if source == "cogvlm_sat":
        text, mixin = f"transformer.layers.{layer}.mlp.", "mixins.mlp."
        return Table(
            (
                _rule(r"up\.text", f"{mixin}gate_proj.{layer}", f"{text}dense_h_to_4h"),
                _rule(r"down\.text", f"{text}dense_4h_to_h"),
                _rule(
                    r"up\.vision",
                    f"{mixin}vision_gate_proj.{layer}",
                    f"{mixin}vision_dense_h_to_4h_list.{layer}",
                ),
                _rule(r"down\.vision", f"{mixin}vision_dense_4h_to_h_list.{layer}"),
            )
        )
    rules: list[Rule] = []
    for modality, name in {"text": "language_mlp", "vision": "vision_mlp"}.items():
        rules += [
            _rule(rf"up\.{modality}", f"{name}.gate_proj", f"{name}.up_proj"),
            _rule(rf"down\.{modality}", f"{name}.down_proj"),
        ]
    return Table(tuple(rules))


def block_table(source: str, layer: int) -> Table:
    """SAT keeps a layer's parts in several places, under its number; Hugging Face's keys are those after the number."""
    attention, mlp = attention_table(source, layer), mlp_table(source, layer)
    sat = source == "cogvlm_sat"
    root = f"transformer.layers.{layer}." if sat else ""
    norms = renames(attention_norm=f"{root}input_layernorm", mlp_norm=f"{root}post_attention_layernorm")
    inside = ("", "") if sat else ("self_attn.", "mlp.")
    return Table(norms) + attention.under("attention.", inside[0]) + mlp.under("mlp.", inside[1])
