"""LLaVA's published files: every key of every release finds its parameter, and what is missing or left over is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_llava import small

from mmkernels import models, weights
from mmkernels.layers import Projector

KINDS = {
    "llava": ("linear", "pad"),
    "llava-1.5": ("mlp2x_gelu", "pad"),
    "llava_next": ("mlp2x_gelu", "anyres"),
    "yi_vl": ("mlp2x_gelu_norm", "pad"),
}
JOINT = {
    "linear": {"input": ""},
    "mlp2x_gelu": {"input": "0.", "output": "2."},
    "mlp2x_gelu_norm": {"input": "0.", "norm": "1.", "output": "3.", "output_norm": "4."},
}
BLOCK = {
    "attention_norm": "layer_norm1", "attention.out": "self_attn.out_proj", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}  # fmt: skip


def _model(kind: str) -> models.Llava:
    projector, aspect = KINDS[kind]
    points = ((28, 56),) if aspect == "anyres" else ()
    torch.manual_seed(0)
    return models.build(small(projector=projector, aspect=aspect, pinpoints=points))


def published(model: models.Llava) -> dict[str, torch.Tensor]:
    """The model's parameters under the authors' names."""
    state, out = model.state_dict(), {}

    def both(ours: str, theirs: str) -> None:
        out.update(
            {f"{theirs}.{n}": state[f"{ours}.{n}"] for n in ("weight", "bias") if f"{ours}.{n}" in state}
        )

    for ours, theirs in JOINT[model.projector.kind].items():
        both(f"projector.{ours}", f"model.mm_projector.{theirs}".removesuffix("."))
    if model.image_newline is not None:
        out["model.image_newline"] = state["image_newline"]
    out["model.embed_tokens.weight"] = state["lm.embedding.weight"]
    both("lm.norm", "model.norm")
    both("lm.head", "lm_head")
    for n in range(2):
        at, there = f"lm.blocks.{n}", f"model.layers.{n}"
        both(f"{at}.attention_norm", f"{there}.input_layernorm")
        both(f"{at}.mlp_norm", f"{there}.post_attention_layernorm")
        both(f"{at}.attention.out", f"{there}.self_attn.o_proj")
        both(f"{at}.mlp.down", f"{there}.mlp.down_proj")
        for name, part in zip("qkv", state[f"{at}.attention.qkv.weight"].chunk(3), strict=True):
            out[f"{there}.self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), state[f"{at}.mlp.up.weight"].chunk(2), strict=True):
            out[f"{there}.mlp.{name}_proj.weight"] = part
    return out | tower(state)


def tower(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    at = "model.vision_tower.vision_tower.vision_model."
    out = {
        f"{at}embeddings.class_embedding": state["vision.class_token"],
        f"{at}embeddings.position_embedding.weight": state["vision.positions"],
        f"{at}embeddings.patch_embedding.weight": state["vision.patch.weight"].view(32, 3, 14, 14),
        f"{at}post_layernorm.weight": torch.ones(32),  # behind what is read
        f"{at}post_layernorm.bias": torch.ones(32),
    }
    for kind in ("weight", "bias"):
        out[f"{at}pre_layrnorm.{kind}"] = state[f"vision.pre_norm.{kind}"]
        for n in range(3):
            block, there = f"vision.blocks.{n}", f"{at}encoder.layers.{n}"
            for ours, theirs in BLOCK.items():
                out[f"{there}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
            for name, part in zip("qkv", state[f"{block}.attention.qkv.{kind}"].chunk(3), strict=True):
                out[f"{there}.self_attn.{name}_proj.{kind}"] = part
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_load(kind, tmp_path):
    there, source = _model(kind), kind.split("-")[0]
    file = tmp_path / "model.safetensors"
    weights.save(published(there), file)
    here = _model(kind)
    with torch.no_grad():
        for p in here.parameters():
            p.zero_()
    weights.load(here, file, source=source)
    wanted = there.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in here.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_may_be_kept_apart_where_it_was_frozen(kind):
    here, source, keys = _model(kind), kind.split("-")[0], published(_model(kind))
    without = {k: v for k, v in keys.items() if "vision_tower" not in k}
    if kind == "llava_next":
        with pytest.raises(ValueError, match=r"missing: model\.vision_tower"):
            weights.load(here, without, source=source)
        return
    before = here.vision.positions.clone()
    weights.load(here, without, source=source)
    assert torch.equal(here.vision.positions, before)
    alone = {
        k.removeprefix("model.vision_tower.vision_tower."): v for k, v in keys.items() if "vision_tower" in k
    }
    weights.load(here.vision, alone, source="huggingface_clip")


@pytest.mark.parametrize("kind", KINDS)
def test_a_projector_of_the_first_stage_loads_alone(kind):
    there = _model(kind)
    stage1 = {k: v for k, v in published(there).items() if "mm_projector" in k}
    here = Projector(there.projector.kind, 32, 48)
    weights.load(here, stage1, source=here.sources[0])
    assert all(torch.equal(v, there.projector.state_dict()[k]) for k, v in here.state_dict().items())


def test_what_does_not_fit_is_refused():
    keys = published(_model("llava-1.5"))
    for wrong, match in (
        (
            {k: v for k, v in keys.items() if k != "model.mm_projector.2.bias"},
            "missing: model.mm_projector.2.bias",
        ),
        (keys | {"model.image_newline": torch.zeros(48)}, "left over: model.image_newline"),
        (keys | {"model.mm_projector.0.bias": torch.zeros(47)}, "misshapen: projector.input.bias"),
    ):
        with pytest.raises(ValueError, match=match):
            weights.load(_model("llava-1.5"), wrong, source="llava")


def test_a_published_vocabulary_may_be_padded():
    model = _model("llava-1.5")
    keys = published(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        keys[name] = torch.cat([keys[name], torch.zeros(4, 48)])
    other = models.build(replace(model.config))
    weights.load(other, keys, source="llava")
    assert torch.equal(other.lm.embedding.weight, model.lm.embedding.weight)
