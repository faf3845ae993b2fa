"""CogVLM: layout and positions, text alone, decoding, precisions, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cogvlm_tiny import IMAGE, PLACES, grown, ids, pictures

from mmkernels import models
from mmkernels.layers import Decoder, image_positions
from mmkernels.models.base import MultimodalModel, Tokens


@pytest.fixture(scope="module")
def model() -> models.CogVLM:
    return grown()


class Plain(MultimodalModel):
    """The language model alone, as the skeleton runs it."""

    def __init__(self, config: models.CogVLMConfig) -> None:
        super().__init__()
        self.lm, self.tokens = Decoder(config.lm), config.tokens


@pytest.fixture(scope="module")
def plain(model) -> Plain:
    plain = Plain(model.config).eval()
    text = {n.replace(".text.", "."): p for n, p in model.lm.state_dict().items() if ".vision." not in n}
    plain.lm.load_state_dict(text)
    return plain


def test_the_layout_begins_with_the_beginning(model):
    expanded, mask = model.expand(torch.tensor([[2, 40, 41], [1, 2, 42], [40, 0, 0]]), torch.tensor(
        [[True] * 3, [True] * 3, [True, False, False]]
    ))  # fmt: skip
    image = [2] * PLACES
    assert expanded[0].tolist() == [1, *image, 40, 41]
    assert expanded[1][mask[1]].tolist() == [1, *image, 42]
    assert expanded[2][mask[2]].tolist() == [1, 40]
    types = (expanded == 2).long()
    assert image_positions(types, mask)[0].tolist() == [0, 1, *[2] * 36, 3, 4, 5]
    padded, kept = model.expand(torch.tensor([[0, 2, 40]]), torch.tensor([[False, True, True]]))
    assert padded[kept].tolist() == [1, *image, 40]


@torch.no_grad()
def test_image_tokens_stand_in_their_places(model):
    row, media = ids(f"Ea{IMAGE}b{IMAGE}c"), model.encode(pictures(1, 2))
    assert media.shape == (1, 2, PLACES, 128)
    x, plain = model.embed(row, media), model.lm.embed(row)
    for n, start in ((0, 2), (1, 2 + PLACES + 1)):
        assert torch.equal(x[:, start : start + PLACES], media[:, n])
        x[:, start : start + PLACES] = plain[:, start : start + PLACES]
    assert torch.equal(x, plain)
    assert torch.equal(media[0, :, 0], model.projector.boi.expand(2, -1))
    assert torch.equal(media[0, :, -1], model.projector.eoi.expand(2, -1))


@torch.no_grad()
def test_everything_is_causal_and_images_matter(model):
    row, images = ids(f"E{IMAGE}ab{IMAGE}c"), pictures(1, 2)
    logits, other = model(images, row).logits, pictures(1, 2)
    other[:, 1] += 1
    changed, second = model(other, row).logits, 1 + PLACES + 2
    assert torch.equal(changed[:, :second], logits[:, :second])
    assert (changed[:, -1] - logits[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_text_alone_is_the_language_model_s_own(model, plain):
    """Bit for bit: without images no token is the vision expert's, and its weights are not read."""
    rows = ids("Eabcdefg", "Ehi")
    mask = rows != 0
    assert torch.equal(model(input_ids=rows[:1]).logits, plain(input_ids=rows[:1]).logits)
    ours, theirs = (m(input_ids=rows, attention_mask=mask).logits[mask] for m in (model, plain))
    assert torch.equal(ours, theirs)
    for prompts, kept in ((rows[:1], None), (rows, mask)):
        ours, theirs = (m.generate(None, prompts, kept, max_new_tokens=6, stop=()) for m in (model, plain))
        assert torch.equal(ours, theirs)
    cut = copy.deepcopy(model)
    for name, p in cut.named_parameters():
        if ".vision." in name:
            p.fill_(float("nan"))
    assert torch.equal(cut(input_ids=rows[:1]).logits, plain(input_ids=rows[:1]).logits)


@torch.no_grad()
@pytest.mark.parametrize("split", [(1,), (1, 2), (3,)])
def test_steps_from_a_cache_equal_the_whole(model, split):
    row, images = ids(f"E{IMAGE}abcdefgh", f"Eab{IMAGE}cdefgh"), pictures(2)
    whole = model(images, row).logits
    cache, first = model.new_cache(2, row.shape[1]), PLACES + 3
    parts = [model(images, row[:, :first], cache=cache).logits]
    rest = row[:, first:]
    while rest.shape[1]:
        for n in split:
            if rest.shape[1]:
                parts.append(model(input_ids=rest[:, :n], cache=cache).logits)
                rest = rest[:, n:]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_second_image_enters_a_sequence_that_goes_on(model):
    row, images = ids(f"E{IMAGE}ab{IMAGE}cd"), pictures(1, 2)
    cache, first = model.new_cache(1, row.shape[1]), PLACES + 3
    parts = [model(images[:, :1], row[:, :first], cache=cache).logits]
    parts += [model(images[:, 1:], row[:, first:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(parts, 1), model(images, row).logits, rtol=1e-4, atol=1e-4)
    assert cache.media["types"].shape == row.shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_from_prompts_of_unequal_length(model, side):
    prompts = [f"E{IMAGE}a", f"E{IMAGE}abcd", f"Eabc{IMAGE}d"]
    images, length = pictures(3), max(map(len, prompts))
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


def test_published_names_that_have_no_row_in_the_embedding(model):
    """The published presets mark places with an id outside of the vocabulary."""
    other = models.build(replace(model.config, tokens=Tokens(-200, 3, 1, 0))).eval()
    other.load_state_dict(model.state_dict())
    row, images = ids(f"E{IMAGE}ab"), pictures(1)
    marked = torch.where(row == 2, -200, row)
    with torch.no_grad():
        assert torch.equal(other(images, marked).logits, model(images, row).logits)
    assert torch.equal(
        other.generate(images, marked, max_new_tokens=3, stop=()),
        model.generate(images, row, max_new_tokens=3, stop=()),
    )
    expanded, _ = other.expand(torch.tensor([[-200, 97]]))
    assert expanded.tolist() == [[1, *[-200] * PLACES, 97]]


def test_bad_input_is_refused_by_name(model):
    images, row = pictures(1), ids(f"E{IMAGE}a")
    for match, call in (
        ("row 0 has 38 places for images, expected 0: 0 images of 38 tokens", lambda: model(None, row)),
        ("row 0 has 0 places for images, expected 38: 1 images of 38 tokens", lambda: model(images, ids("Eabc"))),
        ("row 0 has 37 places for images, expected 38", lambda: model(images, row[:, 2:])),
        ("row 1 has 0 places for images, expected 38", lambda: model(pictures(2), ids(f"E{IMAGE}a", "Eab"))),
        ("row 0 has 38 places for images, expected 76: 2 images", lambda: model(pictures(1, 2), row)),
        ("images: got shape", lambda: model(images[0], row)),
        ("images: got shape", lambda: model(torch.zeros(1, 1, 3, 32, 32), row)),
        ("media: got shape", lambda: model(input_ids=row, media=torch.zeros(1, 1, 4, 128))),
        ("input_ids: got ids 0 to 600", lambda: model(input_ids=torch.tensor([[0, 600]]))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    assert model(torch.empty(0, 1, 3, 48, 48), row[:0]).logits.shape == (0, row.shape[1], 512)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "narrow_tower"])
def test_lower_precisions_train_and_generate(model, how):
    low, row, images = copy.deepcopy(model).train(), ids(f"E{IMAGE}abE", f"E{IMAGE}cE"), pictures(2)
    if how == "bfloat16":
        low.to(torch.bfloat16)
    if how == "narrow_tower":
        low.vision.to(torch.bfloat16)
    labels = torch.where(row > 2, row, -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = low(images, row, row != 0, labels).loss
        assert low.generate(images, row[:, : PLACES + 1], max_new_tokens=2, stop=()).shape == (2, 2)
    loss.backward()
    with torch.no_grad():
        exact = model(images, row, row != 0, labels).loss
    assert loss.dtype == torch.float32 and abs(float(loss.detach() - exact)) < 0.05 * float(exact)
    assert all(torch.isfinite(p.grad).all() for p in low.parameters() if p.requires_grad)


def test_a_pass_is_one_graph(model):
    row, media = ids(f"E{IMAGE}ab"), torch.randn(1, 1, PLACES, 128)
    run = torch.compile(
        lambda row, media: model(input_ids=row, media=media).logits, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(run(row, media), model(input_ids=row, media=media).logits)
