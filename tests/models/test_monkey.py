"""Monkey: published sizes, windows and the whole, stages and what they freeze, decoding, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmkernels import models
from mmkernels.models.monkey import MonkeyVision, VisionConfig, global_view, windows

SLOTS = 80


@pytest.fixture(scope="module")
def model() -> models.Monkey:
    torch.manual_seed(0)
    model = models.build("monkey-tiny").eval()
    assert isinstance(model, models.Monkey)
    return model


def pictures(batch: int, images: int) -> torch.Tensor:
    return torch.randn(batch, images, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "count"), [("monkey-7b", 4), ("monkey-7b-1344", 6)])
def test_the_presets_have_the_published_size(name, count):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    qwen = models.build("qwen-vl-7b", device="meta", dtype=torch.bfloat16)
    extra = 48 * count * 266_243
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in qwen.parameters()) + extra
    loras = [p for n, p in model.named_parameters() if "_lora." in n]
    assert sum(p.numel() for p in loras) == extra
    assert model.config.slots == 256 * (count + 1)
    assert round(48 * 4 * 266_243 / 1e6, 1) == 51.1


def test_windows_are_row_by_row_and_the_rest_is_dropped():
    picture = torch.arange(5 * 7.0).view(1, 1, 5, 7).expand(1, 3, 5, 7)
    cut = windows(picture, 2)
    assert cut.shape == (1, 6, 3, 2, 2)
    assert cut[0, :, 0, 0, 0].tolist() == [0, 2, 4, 14, 16, 18]
    assert torch.equal(cut[0, 4], picture[0, :, 2:4, 2:4])
    want = F.interpolate(picture, size=(3, 3), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(global_view(picture, 3), want)


@torch.no_grad()
def test_the_order_of_tokens_is_window_by_window_and_the_whole_last(model):
    images = pictures(2, 1)[:, 0]
    vision = model.vision
    media = vision(images)
    assert media.shape == (2, SLOTS, 128)
    whole = vision.encode(global_view(images, 32))
    torch.testing.assert_close(media[:, -16:], whole, rtol=1e-4, atol=1e-4)
    third = vision.encode(images[:, :, 32:, :32], 2)
    torch.testing.assert_close(media[:, 32:48], third, rtol=1e-4, atol=1e-4)


def test_the_last_stage_trains_the_updates_the_resampler_and_the_language_model(model):
    model.stages()[-1].freeze(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for name in (
        "vision.proj",
        "vision.post_norm.weight",
        "vision.blocks.0.mlp.up.weight",
        "vision.positions",
    ):
        assert name not in trained
    for name in (
        "vision.blocks.1.qkv_lora.a",
        "vision.blocks.0.mlp_lora.scale",
        "vision.resampler.query",
        "lm.norm.weight",
    ):
        assert name in trained
    groups = model.stages()[-1].parameter_groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert "vision.blocks.1.qkv_lora.b" in decayed and "vision.blocks.0.mlp_lora.scale" not in decayed
    assert "lm.norm.weight" not in decayed and "lm.head.weight" in decayed
    first = model.stages()[0]
    first.freeze(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_lora." in n)
    model.stages()[-1].freeze(model)


def test_pictures_fill_their_slots_and_the_model_goes_on(model):
    ids, mask = model.expand(torch.tensor([[2, 40, 41], [42, 2, 43]]))
    assert ids.shape[1] == SLOTS + 4
    images = pictures(2, 1)
    with torch.no_grad():
        media = model.encode(images)
        x = model.embed(ids, media)
        assert torch.equal(x[0, 1 : SLOTS + 1], media[0, 0]) and torch.equal(x[1, 2 : SLOTS + 2], media[1, 0])
        together = model.generate(images, ids, mask, max_new_tokens=3, stop=())
        slow = ids[1][mask[1]][None]
        for _ in range(3):
            token = model(images[1:], slow).logits[:, -1].argmax(-1)
            slow = torch.cat([slow, token[:, None]], 1)
    assert torch.equal(together[1], slow[0, -3:])


def test_dropout_reads_the_updates_alone():
    torch.manual_seed(3)
    config = VisionConfig((8, 8), 8, 4, 16, 1, 2, 32, cells=2, grid=2, lm_width=16, lm_heads=2, dropout=0.5)
    vision, images = MonkeyVision(config), torch.randn(1, 3, 8, 8)
    assert torch.equal(vision(images), vision(images))  # B is 0 at first
    with torch.no_grad():
        vision.blocks[0].mlp_lora.b.normal_()
    assert not torch.equal(vision(images)[:, :4], vision(images)[:, :4])
    whole = torch.full((1,), -1)
    assert torch.equal(vision.encode(images, whole), vision.encode(images, whole))


def test_bad_input_is_refused_by_name(model):
    for match, call in (
        (
            "images: got 128 x 64 pixels|images: got 8 windows, expected at most 4",
            lambda: model.vision(torch.ones(1, 3, 128, 64)),
        ),
        (
            "images: got 16 x 64 pixels, expected at least one window of 32 x 32",
            lambda: windows(torch.ones(1, 3, 16, 64), 32),
        ),
        (
            "images: got 12 x 8 pixels, expected whole patches of 8",
            lambda: model.vision.encode(torch.ones(1, 3, 12, 8)),
        ),
        (
            "window: row|segment: row 0 has window 4, expected 0 to 3",
            lambda: model.vision.encode(torch.ones(1, 3, 8, 8), 4),
        ),
        ("window: got shape", lambda: model.vision.blocks[0](torch.ones(2, 3, 128), torch.ones(1).long())),
        ("window: got 16 for a canvas of", lambda: MonkeyVision(VisionConfig((8, 8), 16))),
        ("size: got 0", lambda: global_view(torch.ones(1, 3, 4, 4), 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
