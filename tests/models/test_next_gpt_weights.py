"""Files of NExT-GPT's first release, with PEFT's names and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmkernels import layers, models, weights
from mmkernels.models.next_gpt import MODALITIES

TINY: Any = models.config("next_gpt-tiny")


def state(model: Any, release: str, peft: str) -> dict[str, torch.Tensor]:
    """A model's parameters under the authors' names, by hand: what is trained, and of the language model a few."""
    own, found = model.state_dict(), {}
    out = {"first": ("gen_text_hidden_fcs{}.0.", ("", "_video", "_audio")),
           "second": ("model.mm_output_{}_projector.", ("img", "vid", "aud"))}[release]  # fmt: skip
    ends = {"first": ("fc", "model"), "second": ("in_fc", "out_fc")}[release]
    for name, word in zip(MODALITIES, out[1], strict=True):
        twin = torch.nn.Module()
        twin.add_module("module", model.out[name])
        found |= {f"{out[0].format(word)}{k}": v for k, v in published(model.out[name], ends).items()}
    if release == "first":
        found |= {f"llama_proj.{n}": own[f"project.{n}"] for n in ("weight", "bias")}
    layer = f"{peft}model.layers.0.self_attn."
    down, up = own["lm.blocks.0.attention.qkv.lora_down"], own["lm.blocks.0.attention.qkv.lora_up"]
    for n, letter in enumerate("qkv"):
        found[f"{layer}{letter}_proj.lora_A.default.weight"] = down[n * 8 : n * 8 + 8]
        found[f"{layer}{letter}_proj.lora_B.default.weight"] = up[n * 128 : n * 128 + 128]
    return found | {
        f"{peft}model.embed_tokens.weight": own["lm.embedding.weight"],
        "visual_encoder.x": torch.ones(1),
    }


def published(projection: layers.OutputProjection, ends: tuple[str, str]) -> dict[str, torch.Tensor]:
    own, found = projection.state_dict(), {}
    for name, value in own.items():
        key = name.replace("input.", f"{ends[0]}.").replace("output.", f"{ends[1]}.")
        for side, last in (("encoder", "norm2"), ("decoder", "norm3")):
            key = key.replace(f"{side}_norm", f"tfm.{side}.norm") if key.startswith(f"{side}_norm") else key
            if key.startswith(f"{side}."):
                key = f"tfm.{side}.layers{key[len(side) :]}"
                for a, b in (("attention.qkv.", "self_attn.in_proj_"), ("attention.out", "self_attn.out_proj"),
                             ("attention_norm", "norm1"), ("cross.out", "multihead_attn.out_proj"), ("cross_norm", "norm2"),
                             ("mlp.up", "linear1"), ("mlp.down", "linear2"), ("mlp_norm", last)):  # fmt: skip
                    key = key.replace(a, b)
        found[key] = value
    for key in [k for k in found if ".cross.q." in k]:
        kv = key.replace(".cross.q.", ".cross.kv.")
        found[key.replace("cross.q.", "multihead_attn.in_proj_")] = torch.cat([found.pop(key), found.pop(kv)])
    found["query_embs"] = found.pop("queries")[None]
    return found


@pytest.mark.parametrize("peft", ["llama_model.base_model.model.", "llama_model."])
def test_files_of_the_first_release_load(peft):
    torch.manual_seed(1)
    config = replace(TINY, grouping=None)
    there: Any = models.build(config)
    for p in there.parameters():
        p.data.normal_()
    here: Any = models.build(config)
    file = state(there, "first", peft)
    weights.load(here, file, source="next_gpt")
    for name in ("project.weight", "out.video.decoder.1.cross.kv.weight", "out.audio.queries", "lm.embedding.weight",
                 "lm.blocks.0.attention.qkv.lora_down", "lm.blocks.0.attention.qkv.lora_up"):  # fmt: skip
        assert torch.equal(here.state_dict()[name], there.state_dict()[name]), name
    del file["gen_text_hidden_fcs.0.tfm.encoder.layers.1.linear1.bias"]
    with pytest.raises(
        ValueError, match=r"missing: gen_text_hidden_fcs\.0\.tfm\.encoder\.layers\.1\.linear1\.bias"
    ):
        weights.load(here, file, source="next_gpt")
