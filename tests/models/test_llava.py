"""LLaVA: published sizes, features, places, decoding, what is frozen, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mmkernels import models
from mmkernels.layers import VisionConfig
from mmkernels.models.base import Tokens
from mmkernels.models.llava import LlavaConfig

PLACES = 4
IMAGE = [2] * PLACES


def small(**changes) -> LlavaConfig:
    lm = models.config("llava-1.5-7b").lm
    block = replace(lm.block, width=48, heads=4, hidden=64)
    vision = VisionConfig(28, 14, 32, 3, 4, 48, select_layer=-2)
    stage = replace(models.config("llava-1.5-7b").stages[-1], trainable=("projector.*", "lm.*"))
    tokens = Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0)
    return LlavaConfig(
        vision, replace(lm, block=block, layers=2, vocab=60, std=0.3), tokens, (stage,), **changes
    )


@pytest.fixture(scope="module")
def model() -> models.Llava:
    torch.manual_seed(0)
    return models.build(small()).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "published", "places"),
    [  # Hugging Face's files hold so many, but for rows that they add to the vocabulary and the unread norm of the tower
        ("llava-7b", 7.046e9, 256),
        ("llava-13b", 13.324e9, 256),
        ("llava-1.5-7b", 7.063e9, 576),
        ("llava-1.5-13b", 13.351e9, 576),
        ("llava-next-7b", 7.566e9, 577),
        ("llava-next-vicuna-7b", 7.063e9, 577),
        ("llava-next-13b", 13.351e9, 577),
        ("llava-next-34b", 34.751e9, 577),
        ("llavar-13b", 13.325e9, 576),
        ("svit-13b", 13.351e9, 576),
        ("yi-vl-6b", 6.715e9, 1024),
        ("yi-vl-34b", 35.081e9, 1024),
    ],
)
def test_presets_have_the_published_sizes(name, published, places):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    counts = {
        part: sum(p.numel() for n, p in model.named_parameters() if n.startswith(part))
        for part in ("vision.", "projector.", "lm.")
    }
    c, v = model.config.lm, model.config.vision
    width, block = c.block.width, c.block
    kv = (block.kv_heads or block.heads) * (width // block.heads)
    layer = 2 * width**2 + 2 * width * kv + 3 * width * block.hidden + 2 * width
    assert counts["lm."] == c.layers * layer + 2 * c.vocab * width + width
    mlp = v.width * width + width + (width**2 + width if model.config.projector != "linear" else 0)
    assert counts["projector."] == mlp + (4 * width if name.startswith("yi") else 0)
    layers, wide = (32, 1280) if name.startswith("yi") else (24, 1024)
    tower = (
        layers * (12 * wide**2 + 13 * wide) + 588 * wide + wide + (places // 1 - (places == 577) + 1) * wide
    )
    assert counts["vision."] == tower + 2 * wide
    total = sum(p.numel() for p in model.parameters())
    assert abs(total - published) < 0.001 * published and model.config.places == places
    for stage in model.stages():
        stage.freeze(model)
        trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert "projector" in trained and ("lm" in trained) == (stage is model.stages()[-1])
        sees = name.startswith("yi") or (name.startswith("llava-next") and stage is model.stages()[-1])
        assert ("vision" in trained) == sees
        assert not any(p.requires_grad for p in model.vision.blocks[-1].parameters())  # it is never read


def test_the_recipes_are_the_published_ones():
    for name, steps, rates in (
        ("llava-7b", [4651, 1232], [2e-3, 2e-5]),
        ("llava-1.5-13b", [2180, 5198], [1e-3, 2e-5]),
        ("llava-next-34b", [2180, 5938], [1e-3, 1e-5]),
        ("llavar-13b", [7948, 16286], [2e-3, 2e-5]),
        ("svit-13b", [2180, 5198], [1e-3, 2e-5]),
        ("yi-vl-6b", [24414, 6104, 7812], [1e-4, 1e-4, 2e-5]),
    ):
        stages = models.config(name).stages
        assert [s.steps for s in stages] == steps and [s.learning_rate for s in stages] == rates
        assert all(s.warmup == 0.03 and s.schedule == "cosine" and not s.weight_decay for s in stages)
    yi = models.config("yi-vl-34b").stages
    assert [s.clip for s in yi] == [0.5, 0.5, 1.0] and [s.image_size for s in yi] == [224, None, None]
    groups = models.build("llava-next-7b", device="meta").stages()[-1]
    model = models.build("llava-next-7b", device="meta")
    groups.freeze(model)
    rates = {g["lr"]: len(g["params"]) for g in groups.parameter_groups(model)}
    assert sorted(rates) == pytest.approx([2e-6, 1e-5])


@torch.no_grad()
def test_features_are_those_before_the_last_block(model):
    images = pictures(2)
    cut = models.build(replace(model.config, vision=replace(model.config.vision, layers=2, select_layer=-1)))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("vision.blocks.2.")}
    cut.load_state_dict(state)
    assert torch.equal(model.features(images), cut.features(images))
    seen = models.build(replace(model.config, vision=replace(model.config.vision, keep_class=True)))
    seen.load_state_dict(model.state_dict())
    assert seen.config.places == PLACES + 1
    assert torch.equal(seen.features(images)[:, 1:], model.features(images))
    with pytest.raises(ValueError, match="select_layer: got -5, expected -4 to 3"):
        models.build(replace(model.config, vision=replace(model.config.vision, select_layer=-5)))


@torch.no_grad()
def test_visual_tokens_stand_in_their_places_in_the_order_of_the_batch(model):
    ids = torch.tensor([[*IMAGE, 7, *IMAGE], [8, 9, *IMAGE, 0, 0, 0], [5] * 9])
    media = model.encode(pictures(3))
    x, plain = model.embed(ids, media), model.lm.embed(ids)
    assert torch.equal(x[ids == 2], media) and torch.equal(x[ids != 2], plain[ids != 2])
    assert torch.equal(model.encode(pictures(3)), model.encode(pictures(3).view(1, 3, 3, 28, 28)))


def test_expansion(model):
    ids = torch.tensor([[2, 7, 8], [9, 2, 2], [9, 0, 0]])
    rows, mask = model.expand(ids, ids != 0)
    assert [r[m].tolist() for r, m in zip(rows, mask, strict=True)] == [
        [*IMAGE, 7, 8], [9, *IMAGE, *IMAGE], [9]
    ]  # fmt: skip
    marked = models.build(replace(model.config, marks=(50, 51)))
    assert marked.expand(ids[:1])[0].tolist() == [[50, *IMAGE, 51, 7, 8]]
    anyres = models.build(replace(model.config, aspect="anyres", pinpoints=((28, 56),)))
    assert anyres.config.places == PLACES + 1 and anyres.expand(ids[:1])[0].shape == (1, PLACES + 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_from_rows_with_and_without_pictures(model, side):
    prompts = [[*IMAGE, 7], [8, *IMAGE, 9, 10, 11], [12, 13]]
    longest = max(map(len, prompts))
    pads = [[0] * (longest - len(p)) for p in prompts]
    rows = torch.tensor([p + q if side == "right" else q + p for p, q in zip(prompts, pads, strict=True)])
    images = pictures(2)
    together = model.generate(images, rows, rows != 0, max_new_tokens=4, stop=())
    for n, prompt in enumerate(prompts):
        slow = torch.tensor([prompt])
        for _ in range(4):  # without a cache
            with torch.no_grad():
                own = images[n : n + 1] if n < 2 else None
                slow = torch.cat([slow, model(own, slow).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(together[n], slow[0, len(prompt) :]), n


@torch.no_grad()
def test_an_image_token_without_a_row_in_the_embedding(model):
    other = models.build(replace(model.config, tokens=Tokens(-200, 3, 1, 0))).eval()
    other.load_state_dict(model.state_dict())
    row, images = torch.tensor([[*IMAGE, 7, 8]]), pictures(1)
    assert torch.equal(other(images, torch.where(row == 2, -200, row)).logits, model(images, row).logits)


@torch.no_grad()
def test_a_model_may_write_the_image_token(model):
    """It has a row in a small vocabulary, and no picture comes with it then."""
    row, cache = torch.tensor([[*IMAGE, 7, 8]]), model.new_cache(1, 8)
    model(pictures(1), row, cache=cache)
    assert model(None, torch.tensor([[2]]), cache=cache).logits.shape == (1, 1, 60)
    biased = copy.deepcopy(model)
    biased.lm.head.weight.zero_()
    biased.lm.head.weight[2] = 1.0
    assert biased.generate(pictures(1), row, max_new_tokens=3, stop=()).shape == (1, 3)


def test_a_batch_without_pictures_reaches_all_parameters(model):
    model = copy.deepcopy(model).train()
    row = torch.tensor([[7, 8, 9]])
    model(None, row, labels=row).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    assert not any(g.any() for n, g in grads.items() if n.startswith("projector."))


def test_bad_input_is_refused_by_name(model):
    row = torch.tensor([[*IMAGE, 7], [8, 8, 8, 8, 8]])
    for match, call in (
        ("got 4 places for visual tokens .by row: 4, 0.", lambda: model(None, row)),
        ("got 4 places .* expected 8", lambda: model(pictures(2, 1), row)),
        ("images: got shape", lambda: model(torch.zeros(1, 3, 14, 14), row)),
        ("media: got shape", lambda: model(input_ids=row, media=torch.zeros(4, 7))),
        ("aspect: got 'wide'", lambda: small(aspect="wide")),
        ("pinpoints: got 0 for aspect 'anyres'", lambda: small(aspect="anyres")),
    ):
        with pytest.raises(ValueError, match=match):
            call()
