"""Qwen-VL: sizes, images in their slots, stages and what they freeze, decoding, and a short training on real pictures."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_qwen_text import ids

from mmkernels import models
from mmkernels.layers import interpolate_positions

SLOTS = 16
IMAGE = "I" + "s" * SLOTS + "J"


@pytest.fixture(scope="module")
def model() -> models.QwenVL:
    torch.manual_seed(0)
    return models.build("qwen_vl-tiny").eval()


def pictures(batch: int, images: int, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, images, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_the_preset_has_the_published_size():
    model = models.build("qwen-vl-7b", device="meta", dtype=torch.bfloat16)
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in (
        ("vision", model.vision), ("tower", model.vision.tower), ("adapter", model.vision.resampler), ("lm", model.lm),
    )}  # fmt: skip
    block = 4 * 1664**2 + 4 * 1664 + 2 * 1664 * 8192 + 8192 + 1664 + 4 * 1664
    tower = 588 * 1664 + 256 * 1664 + 2 * 1664 + 48 * block
    adapter = 256 * 4096 + 1664 * 4096 + 4 * 4096**2 + 4 * 4096 + 4 * 4096
    layer = 4 * 4096**2 + 3 * 4096 + 3 * 4096 * 11_008 + 2 * 4096
    lm = 2 * 151_936 * 4096 + 32 * layer + 4096
    assert (counts["tower"], counts["adapter"], counts["lm"]) == (tower, adapter, lm)
    assert counts["vision"] == tower + adapter + 4096**2 + 2 * 4096
    rounded = {"vision": 1.9, "lm": 7.7}
    assert all(abs(counts[n] / 1e9 - size) < 0.05 for n, size in rounded.items())
    assert round(counts["adapter"] / 1e9, 2) == 0.08
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.vision.resampler.positions.shape == (256, 4096) and model.config.slots == 256


@torch.no_grad()
def test_image_tokens_stand_strictly_between_their_marks(model):
    row, images = ids(f"ab{IMAGE}c{IMAGE}d", f"{IMAGE}" + "e" * 22), pictures(2, 2)
    media = model.encode(images)
    assert media.shape == (2, 2, SLOTS, 128)
    x, plain = model.embed(row, media), model.lm.embed(row)
    for b, n, start in ((0, 0, 3), (0, 1, 3 + SLOTS + 3), (1, 0, 1)):
        assert torch.equal(x[b, start : start + SLOTS], media[b, n])
        x[b, start : start + SLOTS] = plain[b, start : start + SLOTS]
    assert torch.equal(x, plain)


@torch.no_grad()
def test_what_stands_in_a_slot_is_not_read(model):
    row, images = ids(f"a{IMAGE}bc"), pictures(1, 1)
    other = row.clone()
    other[0, 2 : 2 + SLOTS] = torch.arange(20, 20 + SLOTS)  # the bytes of a path, in published files
    assert torch.equal(model(images, row).logits, model(images, other).logits)


@torch.no_grad()
def test_everything_is_causal(model):
    row, images = ids(f"a{IMAGE}b{IMAGE}cd"), pictures(1, 2)
    logits = model(images, row).logits
    other = images.clone()
    other[:, 1] += 1
    changed, second = model(other, row).logits, SLOTS + 5
    assert torch.equal(changed[:, :second], logits[:, :second])
    assert not torch.equal(
        changed[:, second], logits[:, second]
    )  # an image's tokens see each other causally too


@torch.no_grad()
def test_larger_images_give_as_many_tokens(model):
    row = ids(f"a{IMAGE}b")
    seen = []
    handle = model.vision.tower.register_forward_hook(lambda _, i, y: seen.append(tuple(y.shape)))
    for side in (32, 64, 24):
        assert model(pictures(1, 1, side), row).logits.shape == (1, SLOTS + 4, 512)
    wide = model.encode(torch.randn(1, 1, 3, 32, 64))
    handle.remove()
    assert wide.shape == (1, 1, SLOTS, 128)
    assert seen == [(1, 16, 128), (1, 64, 128), (1, 9, 128), (1, 32, 128)]


@torch.no_grad()
def test_a_stored_table_is_stretched_for_448_pixels():
    """The published proportions, narrow: 256 stored rows, 1024 patches, 256 tokens."""
    tiny = models.config("qwen_vl-tiny")
    vision = replace(tiny.vision, image_size=224, patch_size=14, layers=1)
    model = models.build(replace(tiny, vision=vision, grid=16)).eval()
    resampler, seen = model.vision.resampler, []
    handle = resampler.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    media = model.encode(torch.randn(1, 1, 3, 448, 448))
    handle.remove()
    assert model.vision.tower.positions.shape[0] == resampler.positions.shape[0] == 256
    assert seen == [1024] and media.shape == (1, 1, 256, 128)
    assert interpolate_positions(resampler.positions, (32, 32)).shape == (1024, 128)


def _trained(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_stages_freeze_what_the_published_ones_do(model):
    model, big = copy.deepcopy(model), models.build("qwen-vl-7b", device="meta")
    for built, first in ((model, 1), (big, 0)):
        pretrain, multitask, chat = built.stages()[first:]
        assert [s.name for s in (pretrain, multitask, chat)] == ["pretrain", "multitask", "chat"]
        small = built.config.vision.image_size
        assert [s.image_size for s in (pretrain, multitask, chat)] == [small, 2 * small, 2 * small]
        pretrain.freeze(built)
        assert all(t == n.startswith("vision.") for n, t in _trained(built).items())
        multitask.freeze(built)
        assert all(_trained(built).values())
        chat.freeze(built)  # the switch that spares the resampler freezes norm and projection with the tower
        assert all(t == n.startswith(("lm.", "vision.resampler.")) for n, t in _trained(built).items())
        assert not built.vision.proj.requires_grad and not built.vision.post_norm.weight.requires_grad
        assert chat.betas == (0.9, 0.95)
        groups = {d["weight_decay"]: d["params"] for d in chat.parameter_groups(built)}
        assert set(groups) == {0.0, 0.1} and all(p.dim() == 2 for p in groups[0.1])
        assert set(pretrain.losses) == set(pretrain.mix) and sum(multitask.losses.values()) in (
            2,
            pytest.approx(1),
        )
        assert not any(buffer.requires_grad for buffer in built.buffers())


def test_a_batch_without_images_reaches_all_parameters(model):
    """As ranks whose batches have images do: a black picture is read and counts nothing."""
    model = copy.deepcopy(model).train()
    model.stages()[2].freeze(model)
    row = ids("abcdefE", "ghi....")
    labels = torch.where(row != 0, row, -100)
    losses = []
    for images in (None, torch.empty(2, 0, 3, 32, 32)):
        model.zero_grad()
        losses.append(model(images, row, row != 0, labels).loss)
        losses[-1].backward()
        vision = [p.grad for p in model.vision.parameters()]
        assert all(g is not None and not g.any() for g in vision)
        assert all(p.grad is not None and p.grad.any() for p in model.lm.parameters())
    ran = []
    handle = model.vision.register_forward_hook(lambda *_: ran.append(1))
    plain = model.eval()(None, row, row != 0, labels).loss  # outside of training nothing is read
    model.train().stages()[0].freeze(model)
    model.vision.requires_grad_(False)
    frozen = model(None, row, row != 0, labels).loss
    handle.remove()
    assert not ran and all(torch.equal(x.detach(), plain.detach()) for x in (*losses, frozen))


@torch.no_grad()
def test_steps_from_a_cache_equal_the_whole(model):
    row, images = ids(f"a{IMAGE}bcdefg", f"ab{IMAGE}cdefg"), pictures(2, 1)
    whole = model(images, row).logits
    cache = model.new_cache(2, row.shape[1])
    first = SLOTS + 4
    parts = [model(images, row[:, :first], cache=cache).logits]
    parts += [model(input_ids=part, cache=cache).logits for part in row[:, first:].split((1, 2, 2), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_from_prompts_of_unequal_length(model, side):
    prompts = [f"ab{IMAGE}c{IMAGE}", f"{IMAGE}d", "xyz"]
    images, length = pictures(3, 2), max(map(len, prompts))
    pad = str.rjust if side == "left" else str.ljust
    rows = ids(*(pad(p, length, ".") for p in prompts))
    together = model.generate(images, rows, rows != 0, max_new_tokens=4, stop=())
    for n, prompt in enumerate(prompts):
        slow = ids(prompt)
        for _ in range(4):  # without a cache
            with torch.no_grad():
                token = model(images[n : n + 1], slow).logits[:, -1].argmax(-1)
            slow = torch.cat([slow, token[:, None]], 1)
        assert torch.equal(together[n], slow[0, len(prompt) :]), n


def test_a_model_may_write_an_image_token(model):
    """It has no image then: nothing is read, and nothing refused."""
    with torch.no_grad():
        cache = model.new_cache(1, 40)
        model(pictures(1, 1), ids(f"{IMAGE}a"), cache=cache)
        assert torch.isfinite(model(input_ids=ids("I"), cache=cache).logits).all()


def test_bad_input_is_refused_by_name(model):
    images, row = pictures(1, 1), ids(f"a{IMAGE}b")
    short = ids(f"aI{'s' * (SLOTS - 1)}Jb")
    for match, call in (
        ("input_ids: row 0 opens an image at 1, expected 16 slots and token 507", lambda: model(images, short)),
        ("input_ids: row 0 opens an image at 1", lambda: model(images, row[:, :9])),
        ("images: got 1 a row, expected as many as image tokens, of which a row has 2",
         lambda: model(images, ids(f"{IMAGE}{IMAGE}"))),
        ("images: got 0 a row", lambda: model(None, row)),
        ("images: got shape", lambda: model(images[0], row)),
        ("images: got 30 x 30 pixels", lambda: model(pictures(1, 1, 30), row)),
        ("media: got shape", lambda: model(pictures(2, 1), row)),
        ("media: got shape", lambda: model(input_ids=row, media=torch.zeros(1, 1, 4, 128))),
        ("batches: got", lambda: model.loss({"pairs": {}}, model.stages()[2])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    assert model(torch.empty(0, 1, 3, 32, 32), row[:0]).logits.shape == (0, row.shape[1], 512)


def test_images_enter_the_text_in_one_graph(model):
    row, media = ids(f"a{IMAGE}bcE"), torch.randn(1, 1, SLOTS, 128)
    embed = torch.compile(model.embed, backend="eager", fullgraph=True)
    assert torch.equal(embed(row, media), model.embed(row, media))


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "narrow_tower"])
def test_lower_precisions_train_and_generate(model, how):
    low, row, images = copy.deepcopy(model).train(), ids(f"a{IMAGE}bcE", f"{IMAGE}defg"), pictures(2, 1, 64)
    if how == "bfloat16":
        low.to(torch.bfloat16)
    if how == "narrow_tower":
        low.vision.tower.to(torch.bfloat16)
    labels = models.qwen_text.text_labels(row, model.tokens, model.marks, SLOTS)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = low(images, row, row != 0, labels).loss
        assert low.generate(images, row[:, :19], max_new_tokens=2, stop=()).shape == (2, 2)
    loss.backward()
    exact = model(images, row, row != 0, labels).loss.detach()
    assert loss.dtype == torch.float32 and abs(float(loss.detach() - exact)) < 0.02 * float(exact)
    assert all(torch.isfinite(p.grad).all() for p in low.parameters() if p.requires_grad)
