"""Whole released files of BLIP-2's second stage, InstructBLIP and XComposer: every key by its authors' name, strictly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_files import bert, both, eva, llama, opt, t5
from torch import Tensor

from mmkernels import models, weights

PROJECTIONS = {
    "lavis-opt": "opt_proj",
    "lavis-t5": "t5_proj",
    "instruct": "llm_proj",
    "instruct-t5": "t5_proj",
}
FILES = (*PROJECTIONS, "xcomposer")


def _config(file: str) -> models.Blip2Config:
    """The second stage keeps nothing of a Q-Former that only text goes through, InstructBLIP all but its head."""
    name = {"lavis-opt": "blip2-tiny", "instruct": "instructblip-tiny", "xcomposer": "xcomposer-tiny"}
    config = models.config(name.get(file, "blip2-t5-tiny"))
    assert isinstance(config, models.Blip2Config)
    reads = file.startswith("instruct")
    qformer = replace(config.qformer, vocab=config.qformer.vocab if reads else 0, text_head=False)
    stages = (models.config("instructblip-tiny" if reads else "blip2-tiny").stages[-1],)
    stages = config.stages if file == "xcomposer" else stages
    return replace(config, qformer=qformer, heads=None, stages=stages, instruct=reads)


def _pair(file: str) -> tuple[models.Blip2, models.Blip2]:
    """The model that the file is of, and another one to load it into."""
    torch.manual_seed(0)
    made = models.build(_config(file)), models.build(_config(file))
    with torch.no_grad():
        for model in made:
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.1)
                if name.startswith("vision.") and name.endswith("qkv.bias"):
                    parameter.unflatten(0, (3, -1))[1] = 0  # keys have none
    return made  # type: ignore[return-value]


def _released(model: models.Blip2, file: str, *, frozen: bool = True) -> dict[str, Tensor]:
    """The file, with what was frozen in training or without."""
    state, c = model.state_dict(), model.config
    out = {"query_tokens": state["qformer.query_tokens"].unsqueeze(0)}
    out |= bert(state, "qformer.", "Qformer.bert.", c.qformer)
    out.update(both(state, "ln_vision", "ln_vision"))
    out.update(both(state, "proj", PROJECTIONS.get(file, "internlm_proj")))
    if file == "xcomposer":
        out |= {f"flag_image_{end}": state[f"flag_{end}"].view(1, 1, -1) for end in ("start", "end")}
    if frozen:
        out |= eva(state, "visual_encoder.", c.vision.patch_size)
        out |= {
            "lavis-opt": lambda: opt(state, "opt_model."), "lavis-t5": lambda: t5(state, "t5_model."),
            "instruct": lambda: llama(state, "llm_model."), "instruct-t5": lambda: t5(state, "t5_model."),
            "xcomposer": lambda: llama(state, "internlm_model."),
        }[file]()  # fmt: skip
    return out


@pytest.mark.parametrize("file", FILES)
def test_a_whole_file_loads(file: str) -> None:
    source, target = _pair(file)
    weights.load(target, _released(source, file), source="xcomposer" if file == "xcomposer" else "lavis")
    theirs = source.state_dict()
    for name, value in target.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("file", PROJECTIONS)
def test_a_file_of_what_was_trained_loads_beside_what_was_frozen(file: str) -> None:
    source, target = _pair(file)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    weights.load(target, _released(source, file, frozen=False), source="lavis")
    for name, value in target.state_dict().items():
        expected = before if name.startswith(("vision.", "lm.")) else source.state_dict()
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("file", FILES)
def test_every_missing_key_is_refused_and_so_is_what_is_left_over(file: str) -> None:
    """One key of every part at a time, and a key that belongs to nobody."""
    source, target = _pair(file)
    whole, name = _released(source, file), "xcomposer" if file == "xcomposer" else "lavis"
    before = {n: p.clone() for n, p in target.state_dict().items()}
    read = [
        "query_tokens", "ln_vision.bias", f"{PROJECTIONS.get(file, 'internlm_proj')}.weight",
        "Qformer.bert.embeddings.LayerNorm.weight", "Qformer.bert.encoder.layer.1.attention.self.value.bias",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight",
        "Qformer.bert.encoder.layer.3.output_query.dense.bias",
    ]  # fmt: skip
    if target.config.qformer.vocab:
        read += [
            "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.bert.encoder.layer.0.intermediate.dense.weight",
        ]  # fmt: skip
    if file == "xcomposer":  # its files have everything
        read += [
            "flag_image_end", "visual_encoder.blocks.1.attn.q_bias", "visual_encoder.pos_embed",
            "internlm_model.model.layers.0.self_attn.o_proj.bias", "internlm_model.lm_head.weight",
            "internlm_model.model.layers.2.self_attn.v_proj.lora_B.weight",
            "internlm_model.model.layers.1.mlp.down_proj.lora_A.weight",
        ]  # fmt: skip
    for key in read:
        with pytest.raises(ValueError, match="nothing was loaded") as error:
            weights.load(target, {k: v for k, v in whole.items() if k != key}, source=name)
        assert f"missing: {key}" in str(error.value)
    strangers = ["Qformer.bert.encoder.layer.4.attention.self.query.weight", "mm_projector.weight"]
    if not target.config.qformer.vocab:
        strangers.append("Qformer.bert.encoder.layer.0.intermediate.dense.weight")
    for key in strangers:
        with pytest.raises(ValueError, match=rf"left over: .*{key}"):
            weights.load(target, {**whole, key: torch.ones(2)}, source=name)
    assert all(torch.equal(p, before[n]) for n, p in target.state_dict().items())


def test_a_file_without_updates_is_of_a_model_without() -> None:
    """XComposer's updates are part of its file; a file whose updates were added to the weights has none."""
    config = replace(_config("xcomposer"), lora=None, stages=_config("xcomposer").stages[:2])
    plain = models.build(config)
    state = _released(plain, "xcomposer")  # type: ignore[arg-type]
    assert not any("lora" in key for key in state)
    weights.load(plain, state, source="xcomposer")
    with pytest.raises(ValueError, match=r"missing: .*lora_A\.weight"):
        weights.load(_pair("xcomposer")[1], state, source="xcomposer")
