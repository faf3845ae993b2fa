"""Finetuning as published: larger pictures, towers that learn with their layers at rates of their own, low-rank updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmkernels import models, weights
from mmkernels.layers import VisionTower
from mmkernels.layers.vision import EVA_G
from mmkernels.models.qformer_recipes import COCO_CAPTIONS, RETRIEVAL
from mmkernels.models.qformer_stage1 import RETRIEVAL_COCO, Stage1

SMALL = replace(models.config("llama-vid-tiny").vision, width=12, heads=2, hidden=20, layers=3)


def trained(model, stage) -> set[str]:
    stage.freeze(model)
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["blip2-opt-2.7b-coco", "blip2-opt-6.7b-coco", "blip2-flan-t5-xl-coco"])
def test_coco_captions_train_the_tower_too_at_364_pixels(name):
    model, base = (models.build(n, device="meta", dtype=torch.bfloat16) for n in (name, name[:-5]))
    assert model.vision.positions.shape == (677, 1408) and model.config.vision.image_size == 364
    more = (677 - 257) * 1408
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters()) + more
    (stage,) = model.stages()
    assert trained(model, stage) == {"vision", "qformer", "ln_vision", "proj"}
    assert (stage.learning_rate, stage.warmup, stage.image_size, stage.layer_decay) == (1e-5, 1000, 364, 1.0)
    assert COCO_CAPTIONS.losses == {"captions": 1.0}


def test_retrieval_trains_the_tower_s_deeper_layers_faster():
    with torch.device("meta"):
        model = Stage1(RETRIEVAL_COCO)
    (stage,) = model.stages()
    assert stage is RETRIEVAL and set(stage.losses) == {"itc", "itm", "lm"}
    assert trained(model, stage) == {"vision", "qformer", "ln_vision", "heads"}
    groups = stage.parameter_groups(model)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    scales = {id(p): g["scale"] for g in groups for p in g["params"]}
    for name, power in (
        ("vision.positions", 40), ("vision.patch.weight", 40), ("vision.class_token", 40),
        ("vision.blocks.0.mlp.up.weight", 39), ("vision.blocks.38.mlp_norm.bias", 1), ("ln_vision.weight", 0),
        ("qformer.layers.3.query_ffn.up.weight", 0), ("heads.temp", 0),
    ):  # fmt: skip
        p = model.get_parameter(name)
        assert rates[id(p)] == pytest.approx(1e-5 * 0.95**power), name
        assert scales[id(p)] == pytest.approx(0.95**power), name
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert {p.dim() for g in groups if g["weight_decay"] == 0 for p in g["params"]} <= {0, 1}


def test_a_stage_without_layer_decay_has_one_rate():
    model = models.build("blip2-tiny")
    assert {g["scale"] for s in model.stages() for g in s.parameter_groups(model)} == {1.0}


def _file(side: int) -> dict[str, torch.Tensor]:
    """The released file of a tower for images of `side`, under its authors' names."""
    state = VisionTower(replace(SMALL, image_size=side)).state_dict()
    out = {
        "cls_token": state["class_token"].view(1, 1, -1), "pos_embed": state["positions"].unsqueeze(0),
        "patch_embed.proj.weight": state["patch.weight"].view(12, 3, 8, 8), "patch_embed.proj.bias": state["patch.bias"],
    }  # fmt: skip
    for i in range(3):
        at, ours = f"blocks.{i}.", f"blocks.{i}."
        out[f"{at}attn.qkv.weight"] = state[f"{ours}attention.qkv.weight"]
        out[f"{at}attn.q_bias"], _, out[f"{at}attn.v_bias"] = state[f"{ours}attention.qkv.bias"].chunk(3)
        for theirs, name in (
            ("norm1", "attention_norm"), ("attn.proj", "attention.out"), ("norm2", "mlp_norm"), ("mlp.fc1", "mlp.up"),
            ("mlp.fc2", "mlp.down"),
        ):  # fmt: skip
            out |= {f"{at}{theirs}.{end}": state[f"{ours}{name}.{end}"] for end in ("weight", "bias")}
    return out


def _by_hand(table: torch.Tensor, side: int) -> torch.Tensor:
    """The published stretch: the grid alone, bicubic, pixel centres at halves."""
    old = int((len(table) - 1) ** 0.5)
    cells = table[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], cells.permute(0, 2, 3, 1).flatten(0, 2)])


def test_eva_s_positions_are_stretched_to_the_tower_s_images():
    torch.manual_seed(0)
    file = _file(32)
    for side in (32, 48):
        tower = VisionTower(replace(SMALL, image_size=side))
        weights.load(tower, file, source="eva")
        expected = _by_hand(file["pos_embed"][0], side // 8)
        assert tower.positions.shape == ((side // 8) ** 2 + 1, 12)
        assert torch.equal(tower.positions.data, expected if side != 32 else file["pos_embed"][0])
    with pytest.raises(ValueError, match="misshapen: positions has shape"):
        weights.load(tower, {**file, "pos_embed": torch.zeros(1, 14, 12)}, source="eva")
    with pytest.raises(ValueError, match="misshapen: positions has shape"):
        weights.load(tower, {**file, "pos_embed": torch.zeros(1, 17, 11)}, source="eva")


def test_a_tower_of_336_pixels_takes_the_released_table_of_224():
    """On meta: 257 published rows, 577 of ours; and a file of 336 pixels as it is."""
    for name in ("llama-vid-7b-image", "llama-vid-13b-image"):
        config = models.config(name)
        assert config.vision == replace(EVA_G, image_size=336) and config.tokens_per_frame == 577
    with torch.device("meta"):
        rule = next(
            r
            for r in VisionTower(replace(EVA_G, image_size=336, layers=1)).published("eva").rules
            if r.ours == "positions"
        )
    for rows in (257, 577):
        assert rule.value([torch.empty(1, rows, 1408, device="meta")]).shape == (577, 1408)


@torch.no_grad()
def test_a_tower_goes_on_with_larger_pictures():
    torch.manual_seed(0)
    tower = VisionTower(SMALL)
    tower.positions.requires_grad_(False)
    before = tower.positions.clone()
    assert tower.resize(64) is tower and tower.config.image_size == 64
    assert torch.equal(tower.positions, _by_hand(before, 8)) and not tower.positions.requires_grad
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 65, 12)
    with pytest.raises(ValueError, match="images: got shape"):
        tower(torch.randn(2, 3, 32, 32))
    for side in (0, 30, -8):
        with pytest.raises(
            ValueError, match=f"image_size: got {side}, expected a multiple of patch_size = 8"
        ):
            tower.resize(side)
    assert tower.config.image_size == 64


def test_xcomposer_learns_itself_first_and_its_updates_then():
    for name in ("xcomposer-7b", "xcomposer-tiny"):
        model = models.build(name, device="meta", dtype=torch.bfloat16)
        pretrain, instructions = model.stages()[-2:]
        pretrain.freeze(model)
        flags = {
            n for n, p in model.named_parameters() if not p.requires_grad and not n.startswith("vision.")
        }
        assert {n.split(".")[-1] for n in flags} == {
            "weight", "bias", "flag_start", "flag_end", "lora_down", "lora_up",
        }  # fmt: skip
        assert all(".lora_" in n for n in flags if n.startswith("lm.") and n.split(".")[1] == "blocks")
        instructions.freeze(model)
        learns = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n.split(".")[0] for n in learns} == {"qformer", "proj", "lm"}
        assert all(".lora_" in n for n in learns if n.startswith("lm."))
    lora = models.config("xcomposer-7b").lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (256, 256, 0.05, ("q", "v", "up", "down"))
    tiny = models.config("xcomposer-tiny")
    with pytest.raises(ValueError, match="lora: got one for an encoder-decoder"):
        models.build(replace(models.config("blip2-t5-tiny"), lora=tiny.lora))
