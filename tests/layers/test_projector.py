"""Projectors, and the EVA-E tower in front of CogVLM's: the maths of the spec, published names, sizes, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from published_cogvlm_vision import Vision

from mmkernels.layers import Projector, VisionConfig, VisionTower
from mmkernels.layers.vision import EVA_E
from mmkernels.models import weights

SIZES = {"size": 24, "patch": 6, "width": 32, "heads": 2, "hidden": 48, "layers": 3, "out": 24, "inner": 40}
TOWER = VisionConfig(
    image_size=24, patch_size=6, width=32, layers=3, heads=2, hidden=48, activation="gelu", eps=1e-6, pre_norm=False,
    patch_bias=True, keep_class=True, norm_after=True,
)  # fmt: skip


def published(conv: bool) -> Vision:
    torch.manual_seed(3)
    return Vision(**SIZES, conv=conv).double()


def ours(conv: bool) -> tuple[VisionTower, Projector]:
    return VisionTower(TOWER).double(), Projector("swiglu", 32, 24, hidden=40, conv=conv).double()


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.vision."])
def test_vision_is_the_published_one(conv, prefix):
    theirs, (tower, projector) = published(conv), ours(conv)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    weights.load(tower, state, source="eva")
    weights.load(projector, state, source="cogvlm2" if conv else "cogvlm")
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    x = tower(images)
    torch.testing.assert_close(x, theirs.tower(images), rtol=1e-12, atol=1e-12)
    assert x.shape == (2, 17, 32)
    y, expected = projector(x), theirs(images)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.shape == (2, (4 if conv else 16) + 2, 24)
    weight = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((t * weight).sum(), images)[0] for t in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_class_token_goes_with_the_projector():
    projector, x = Projector("swiglu", 8, 6, hidden=10), torch.randn(1, 5, 8)
    other = x.clone()
    other[:, 0] += 1
    assert torch.equal(projector(x), projector(other))
    assert torch.equal(projector(x)[:, 0], projector.boi[None])
    assert torch.equal(projector(x)[:, -1], projector.eoi[None])


def test_the_norm_after_is_no_norm_before():
    torch.manual_seed(0)
    tower, images = VisionTower(TOWER), torch.randn(1, 3, 24, 24)
    for block in tower.blocks:
        torch.nn.init.zeros_(block.attention_norm.weight)
        torch.nn.init.zeros_(block.mlp_norm.weight)
    x = tower(images)  # with the norms at 0 nothing is added, and nothing norms what comes out
    stem = tower.patch(F.unfold(images, 6, stride=6).transpose(1, 2))
    torch.testing.assert_close(x[:, 1:], stem + tower.positions[1:])


def test_eva_e_has_the_published_sizes():
    tower = _meta(EVA_E)
    block = 4 * 1792**2 + 4 * 1792 + 2 * 1792 * 15_360 + 15_360 + 1792 + 4 * 1792
    stem = 588 * 1792 + 1792 + 1792 + 257 * 1792
    assert sum(p.numel() for p in tower.parameters()) == 63 * block + stem
    assert tower.blocks[0].attention.head_dim == 112 and len(tower.blocks) == 63


def _meta(config: VisionConfig) -> VisionTower:
    with torch.device("meta"):
        return VisionTower(config)


def test_the_training_code_names_the_tower_otherwise():
    theirs, (tower, projector) = published(False), ours(False)
    names = {
        "patch_embedding.proj": "mixins.patch_embedding.proj",
        "patch_embedding.position_embedding": "transformer.position_embeddings",
        "patch_embedding.cls_embedding": "transformer.word_embeddings.weight",
        "mlp.fc1": "mlp.dense_h_to_4h",
        "mlp.fc2": "mlp.dense_4h_to_h",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        renamed = key
        for before, after in names.items():
            renamed = renamed.replace(before, after)
        state[renamed] = value
    rest = ("linear_proj", "boi", "eoi")
    weights.load(tower, {k: v for k, v in state.items() if not k.startswith(rest)}, source="eva")
    sat = {f"mixins.eva.{k}": v for k, v in state.items() if k.startswith(rest)}
    weights.load(projector, sat | {"transformer.layers.0.x": torch.zeros(1)}, source="cogvlm_sat")
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(projector(tower(images)), theirs(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "source", "layers"),
    [
        ("linear", "llava", (torch.nn.Linear(8, 6),)),
        ("mlp2x_gelu", "llava", (torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 6))),
        (
            "mlp2x_gelu_norm",
            "yi_vl",
            (
                torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.GELU(), torch.nn.Linear(6, 6),
                torch.nn.LayerNorm(6),
            ),
        ),
    ],
)  # fmt: skip
def test_the_other_kinds(kind, source, layers):
    theirs = layers[0] if len(layers) == 1 else torch.nn.Sequential(*layers)
    torch.manual_seed(1)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    projector, x = Projector(kind, 8, 6), torch.randn(2, 5, 8)
    state = {f"model.mm_projector.{k}": v for k, v in theirs.state_dict().items()}
    weights.load(projector, {**state, "model.norm.weight": torch.ones(1)}, source=source)
    torch.testing.assert_close(projector(x), theirs(x))
    weights.load(Projector(kind, 8, 6), theirs.state_dict(), source=source)


def test_bad_input_is_refused_by_name():
    glu, conv = Projector("swiglu", 8, 6, hidden=10), Projector("swiglu", 8, 6, hidden=10, conv=True)
    for match, call in (
        ("kind: got 'mlp'", lambda: Projector("mlp", 8, 6)),
        ("hidden: got None for 'swiglu', expected a number", lambda: Projector("swiglu", 8, 6)),
        ("hidden: got 4 for 'linear', expected None", lambda: Projector("linear", 8, 6, hidden=4)),
        ("conv: got True for 'linear'", lambda: Projector("linear", 8, 6, conv=True)),
        ("width: got 0", lambda: Projector("linear", 8, 0)),
        ("x: got shape", lambda: glu(torch.zeros(1, 5, 7))),
        ("x: got 1 tokens, expected a class token and patches", lambda: glu(torch.zeros(1, 1, 8))),
        ("x: got 9 patches, expected the square of an even number", lambda: conv(torch.zeros(1, 10, 8))),
        ("x: got 8 patches, expected the square of an even number", lambda: conv(torch.zeros(1, 9, 8))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert glu(torch.zeros(0, 5, 8)).shape == (0, 6, 6)
