"""Fuyu: sizes, pictures of any size in one text, labels, decoding, edges and refusals; arithmetic is tested in tests/parity."""

from __future__ import annotations

import pytest
import torch

from mmkernels import models
from mmkernels.models.fuyu import answer_labels, patchify, to_picture
from mmkernels.models.spliced import place_runs


@pytest.fixture(scope="module")
def model() -> models.Fuyu:
    torch.manual_seed(0)
    model = models.build("fuyu-tiny").eval()
    assert isinstance(model, models.Fuyu)
    return model


def _pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8 * h, 8 * w, generator=random) for h, w in sizes]


@pytest.mark.parametrize("name", ["fuyu-8b", "otterhd-8b"])
def test_the_presets_have_the_published_size(name):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    layer = 4 * 4096**2 + 4 * 4096 + 2 * 4096 * 16_384 + 16_384 + 4096 + 4 * 4096 + 4 * 64
    want = 2 * 262_144 * 4096 + 36 * layer + 2 * 4096 + 2700 * 4096 + 4096
    assert sum(p.numel() for p in model.parameters()) == want == 9_408_238_592
    assert all(p.requires_grad for p in model.parameters())  # OtterHD tunes all


def test_pictures_and_newlines_stand_where_the_text_says(model):
    sizes = ((2, 3), (1, 1), (4, 2))
    pictures, runs = _pictures(*sizes), [model.run(*size) for size in sizes]
    prompt = torch.tensor([[2, 40, 2, 41], [2, 42, 0, 0]])
    ids, mask = model.expand(prompt, prompt != 0, runs=runs)
    n = model.config.newline
    assert ids[0].tolist() == [2, 2, 2, n, 2, 2, 2, n, 40, 2, n, 41, 0]
    assert ids[1].tolist() == [2, 2, n] * 4 + [42] and mask.sum(1).tolist() == [12, 13]
    media = model.encode(pictures)
    assert media.shape == (6 + 1 + 8, 128)
    x = model.embed(ids, media)
    assert torch.equal(x[ids == 2], media)
    torch.testing.assert_close(media[6], model.encode(pictures[1:2])[0])
    rest = (ids != 2) & mask
    assert torch.equal(x[rest], model.lm.embed(ids)[rest])


def test_a_picture_s_patches_are_its_own(model):
    picture = _pictures((3, 2))[0]
    patches = patchify(picture, 8)
    assert patches.shape == (6, 192)
    cell = picture[:, 8:16, 8:16]
    assert torch.equal(patches[3], cell.permute(1, 2, 0).flatten())
    batch = torch.stack([picture, picture])
    assert torch.equal(patchify(batch, 8), torch.stack([patches, patches]))


def test_what_is_added_to_a_picture_is_nearly_black():
    pixels = torch.full((5, 9, 3), 255, dtype=torch.uint8)
    seen = to_picture(pixels, 4)
    assert seen.shape == (3, 8, 12)
    assert torch.equal(seen[:, :5, :9], torch.ones(3, 5, 9))
    assert torch.allclose(seen[:, 5:], torch.tensor((1 / 255 - 0.5) / 0.5))
    assert torch.equal(to_picture(pixels[:4, :8], 4), torch.ones(3, 4, 8))


def test_answers_are_predicted_up_to_the_second_mark():
    ids = torch.tensor([[5, 9, 6, 7, 9, 8], [5, 6, 9, 7, 0, 0], [5, 5, 5, 5, 5, 5]])
    labels = answer_labels(ids, 9, 1, ids != 0)
    assert labels.tolist() == [[-100, -100, 6, 7, 1, -100], [-100, -100, -100, 7, -100, -100], [-100] * 6]


@torch.no_grad()
def test_steps_from_a_cache_and_generation_equal_the_whole(model):
    pictures = _pictures((2, 2), (1, 3))
    ids, mask = model.expand(
        torch.tensor([[2, 40, 41], [2, 42, 43]]), runs=[model.run(2, 2), model.run(1, 3)]
    )
    together = model.generate(pictures, ids, mask, max_new_tokens=4, stop=())
    for n, picture in enumerate(pictures):
        slow = ids[n][mask[n]][None]
        for _ in range(4):
            token = model([picture], slow).logits[:, -1].argmax(-1)
            slow = torch.cat([slow, token[:, None]], 1)
        assert torch.equal(together[n], slow[0, -4:])


def test_a_model_may_write_a_picture_s_token(model):
    with torch.no_grad():
        cache = model.new_cache(1, 40)
        ids, _ = model.expand(torch.tensor([[2, 40]]), runs=[model.run(1, 1)])
        model(_pictures((1, 1)), ids, cache=cache)
        own = model(input_ids=torch.tensor([[2]]), cache=cache)
    assert torch.isfinite(own.logits).all()
    assert torch.equal(model.embed(torch.tensor([[2]]), None), model.lm.embed(torch.tensor([[2]])))


def test_a_batch_without_pictures_keeps_the_graph(model):
    ids = torch.tensor([[40, 41, 42]])
    model.train()
    loss = model(None, ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and not model.patches.weight.grad.any()
    model.zero_grad()
    model.eval()


def test_bad_input_is_refused_by_name(model):
    ids, _ = model.expand(torch.tensor([[2, 40]]), runs=[model.run(2, 2)])
    for match, call in (
        (
            r"input_ids: got 4 places for visual tokens \(by row: 4\), expected 2",
            lambda: model(_pictures((1, 2)), ids),
        ),
        ("expected 0, as many as there are", lambda: model(None, ids)),
        (
            "images: got 12 x 8 pixels, expected whole patches of 8",
            lambda: model([torch.ones(3, 12, 8)], ids),
        ),
        (
            "images: got 136 x 8 pixels, expected at most 128 x 128",
            lambda: model([torch.ones(3, 136, 8)], ids),
        ),
        ("runs: got 1 for 2 pictures", lambda: model.expand(torch.tensor([[2, 2]]), runs=[[2]])),
        ("frames: got 2, expected 1", lambda: model.expand(ids, frames=2)),
        ("images: got shape", lambda: patchify(torch.ones(8, 8), 8)),
        ("patch: got 0", lambda: patchify(torch.ones(3, 8, 8), 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    none = place_runs(torch.zeros(0, 3, dtype=torch.int64), model.tokens, [])
    assert none.ids.shape == (0, 0)


def test_labels_move_with_the_text(model):
    ids, labels = torch.tensor([[2, 40, 41]]), torch.tensor([[-100, -100, 41]])
    made = place_runs(ids, model.tokens, [[2, 2, 510]], labels=labels)
    assert made.labels is not None and made.labels.tolist() == [[-100, -100, -100, -100, 41]]
