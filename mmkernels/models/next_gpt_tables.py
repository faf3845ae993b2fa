"""Where NExT-GPT's files keep what is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.decoder import Decoder
from mmkernels.layers.lora import LoraConfig, lora_table

# first release, second release
_OUT = {
    "image": ("gen_text_hidden_fcs.0.", "model.mm_output_img_projector."),
    "video": ("gen_text_hidden_fcs_video.0.", "model.mm_output_vid_projector."),
    "audio": ("gen_text_hidden_fcs_audio.0.", "model.mm_output_aud_projector."),
}


def whole_table(lm: Decoder, project: nn.Module, out: Any, lora: LoraConfig | None) -> Table:
    """Both releases' names of projections, language model and updates; encoders and makers are not in their files, and the
    language model may be missing.
    """
    inner: Any = project
    if isinstance(project, nn.Linear):
        table = Table(
            (
                Rule(r"project\.(\w+)", ("llama_proj.{0}",)),
                Rule(r"project\.(\w+)", ("model.mm_input_projector.{0}",)),
            )
        )
    else:
        table = inner.published("next_gpt").under("project.", "model.mm_input_projector.")
    for name, places in _OUT.items():
        for place in places:
            table += out[name].published("next_gpt").under(f"out.{name}.", place)
    own = lm.published(lm.config.family)
    own = own if lora is None else lora_table(lora) + own
    for place in ("llama_model.", "llama_model.base_model.model.", ""):
        table += _with_peft(own, lora is not None).under("lm.", place)
    return table + Table((), (r"(vision|audio|makers|lm)\..*",), (r"visual_encoder\..*",))


def _with_peft(table: Table, lora: bool) -> Table:
    """PEFT's names in memory: updates have a ".default", what they belong to a ".base_layer" in newer versions."""
    if not lora:
        return table
    more: list[Rule] = []
    for rule in table.rules:
        for old, new in (("(lora_[AB])", r"\1.default."), ("(_proj)", r"\1.base_layer.")):
            theirs = tuple(re.sub(rf"{old}\.", new, key) for key in rule.theirs)
            more += [replace(rule, theirs=theirs)] * (theirs != rule.theirs)
    return replace(table, rules=(*table.rules, *more))
