"""LLaVA-UHD: sizes, slices of any size in one text, layouts as planned, packing, released files, decoding, refusals."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from published_files import llama

from mmkernels import models, weights
from mmkernels.data import slicing
from mmkernels.data.looks import look
from mmkernels.models.llava_uhd import pack_image


@pytest.fixture(scope="module")
def model() -> models.LlavaUHD:
    torch.manual_seed(0)
    model = models.build("llava_uhd-tiny").eval()
    assert isinstance(model, models.LlavaUHD)
    return model


def slices(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8 * h, 8 * w, generator=random) for h, w in sizes]


@pytest.mark.parametrize(
    ("name", "queries", "heads"), [("llava-uhd-13b", 64, 8), ("llava-uhd-eccv-13b", 144, 40)]
)
def test_the_presets_have_the_published_size(name, queries, heads):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    d = 5120
    resampler = queries * d + 1024 * d + 4 * d**2 + 4 * d + 6 * d + d**2
    tower = 588 * 1024 + 578 * 1024 + 2 * 1024 + 24 * (12 * 1024**2 + 13 * 1024)
    lm = 2 * 32_000 * d + 40 * (4 * d**2 + 3 * d * 13_824 + 2 * d) + d
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.resampler, model.vision, model.lm)]
    assert counts == [resampler, tower, lm] and model.resampler.heads == heads
    names = [
        {n.split(".")[0] for n, p in model.named_parameters() if _frozen(model, s, n)} for s in model.stages()
    ]
    assert names == [{"vision", "lm"}, {"vision"}]


def _frozen(model, stage, name):
    stage.freeze(model)
    return not dict(model.named_parameters())[name].requires_grad


@pytest.mark.parametrize("size", [(672, 1008), (1000, 300), (333, 3000), (100, 80), (336, 336)])
@pytest.mark.parametrize("release", ["original", "eccv"])
def test_layouts_are_the_plans(size, release):
    name = {"original": "llava-uhd-13b", "eccv": "llava-uhd-eccv-13b"}[release]
    model = models.build(name, device="meta")
    plan = slicing.llava_uhd(*size, release=release)
    assert model.run(*plan.grid) == plan.ids(-200, newline=13, comma=29_892).tolist()


def test_patches_are_packed_row_by_row():
    image = torch.randn(3, 4 * 2, 5 * 2)
    packed = pack_image(image, 2, 5)
    assert packed.shape == (3, 10, 10)
    for k in range(25):
        y, x = divmod(k, 5)
        cell = packed[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        row, column = divmod(k, 5)
        want = (
            image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] if k < 20 else torch.zeros(3, 2, 2)
        )
        assert torch.equal(cell, want)
    tall = torch.randn(3, 14 * 29, 14 * 19)
    packed = pack_image(tall)
    assert packed.shape == (3, 336, 336)
    assert torch.equal(
        packed[:, :14, 14 * 19 : 14 * 20], tall[:, 14:28, :14]
    )  # patch 19 begins the second row of the slice
    for bad in (torch.ones(3, 14 * 25, 14 * 24), torch.ones(3, 15, 14), torch.ones(3, 0, 14)):
        with pytest.raises(ValueError, match="image: got"):
            pack_image(bad)


@torch.no_grad()
def test_a_batch_of_sizes_is_each_slice_alone(model):
    given = slices((4, 4), (3, 5), (4, 4), (1, 2))
    media = model.encode(given)
    assert media.shape == (64, 128)
    for n, one in enumerate(given):
        torch.testing.assert_close(media[16 * n : 16 * n + 16], model.encode([one]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_slices_and_separators_stand_where_the_text_says_and_the_model_goes_on(model):
    given = slices((4, 4), (4, 4), (3, 5), (2, 2))
    prompt = torch.tensor([[2, 40, 41], [2, 42, 43]])
    ids, mask = model.expand(prompt, runs=[model.run(2, 1), model.run(1, 1)])
    assert ids.shape == (2, 48 + 2 + 2) and ids[0, 16] == 510 and ids[0, 33] == 511
    media = model.encode(given)
    x = model.embed(ids, media)
    assert torch.equal(x[ids == 2], media)
    rest = (ids != 2) & mask
    assert torch.equal(x[rest], model.lm.embed(ids)[rest])
    together = model.generate(given, ids, mask, max_new_tokens=3, stop=())
    slow = ids[1][mask[1]][None]
    for _ in range(3):
        token = model(given[3:], slow).logits[:, -1].argmax(-1)
        slow = torch.cat([slow, token[:, None]], 1)
    assert torch.equal(together[1], slow[0, -3:])


@torch.no_grad()
def test_the_first_stage_shows_whole_pictures_alone():
    model = models.build("llava_uhd-tiny").eval()
    seen = [look(Image.new("RGB", (90, 40)), **model.config.look)]
    ids = torch.tensor([[2, 40]])
    whole, media = model.told(seen, ids)
    assert len(media) == 16 * seen[0].plan.views and whole.ids.shape[1] == seen[0].plan.tokens + 1
    model.enter(model.stages()[1])
    alone, only = model.told(seen, ids)
    assert alone.ids.tolist() == [[*[2] * 16, 40]]
    torch.testing.assert_close(only, media[-16:], rtol=1e-4, atol=1e-4)


def test_a_batch_without_pictures_keeps_the_graph(model):
    model.train()
    ids = torch.tensor([[40, 41, 42]])
    model(None, ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values()) and not grads["resampler.query"].any()
    model.zero_grad()
    model.eval()


def test_a_released_file(model):
    torch.manual_seed(2)
    state = model.state_dict()
    file = llama(state)
    names = {
        "query": "query", "positions": "pos_embed", "kv.weight": "kv_proj.weight", "qkv.weight": "attn.in_proj_weight",
        "qkv.bias": "attn.in_proj_bias", "out.weight": "attn.out_proj.weight", "out.bias": "attn.out_proj.bias",
        "query_norm.weight": "ln_q.weight", "query_norm.bias": "ln_q.bias", "media_norm.weight": "ln_kv.weight",
        "media_norm.bias": "ln_kv.bias", "post_norm.weight": "ln_post.weight", "post_norm.bias": "ln_post.bias",
        "proj": "proj",
    }  # fmt: skip
    names = {ours: name for ours, name in names.items() if f"resampler.{ours}" in state}
    file |= {
        f"model.mm_projector.{name}": torch.randn_like(state[f"resampler.{ours}"])
        for ours, name in names.items()
    }
    fresh = models.build("llava_uhd-tiny").eval()
    tower = fresh.vision.positions.clone()
    weights.load(fresh, file, source="llava_uhd")
    assert torch.equal(fresh.vision.positions, tower)  # a file may leave the tower out
    for ours, name in names.items():
        assert torch.equal(fresh.state_dict()[f"resampler.{ours}"], file[f"model.mm_projector.{name}"])
    assert torch.equal(fresh.lm.head.weight, file["lm_head.weight"])
    weights.load(fresh.resampler, file, source="llava_uhd")
    del file["model.mm_projector.proj"]
    with pytest.raises(ValueError, match=r"missing: model\.mm_projector\.proj"):
        weights.load(fresh, file, source="llava_uhd")


def test_bad_input_is_refused_by_name(model):
    ids, _ = model.expand(torch.tensor([[2]]), runs=[model.run(1, 1)])
    for match, call in (
        ("input_ids: got 16 places for visual tokens", lambda: model(slices((1, 1), (1, 1)), ids)),
        (
            "images: got 12 x 8 pixels, expected whole patches of 8",
            lambda: model([torch.ones(3, 12, 8)], ids),
        ),
        ("runs: got 0 for 1 pictures", lambda: model.expand(torch.tensor([[2]]))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
