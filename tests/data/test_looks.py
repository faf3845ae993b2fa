"""Pictures cut as the plans say, what their patches hold, and batches that are the same again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels import data, models
from mmkernels.data import Tokenizer, cuttings, images, pages
from mmkernels.data.cuttings import Cuttings
from mmkernels.data.looks import look
from mmkernels.data.scenes import Cutting
from mmkernels.models.base import Tokens

UHD = {"scale": 32, "patch": 8, "tokens_per_view": 16, "release": "eccv"}
RULES = {
    "llava_uhd": UHD,
    "slime": {"tile": 32, "patch": 8, "tokens_per_view": 9},
    "monkey": {"canvas": 64, "window": 32, "patch": 8, "tokens_per_view": 16},
}


def picture(width: int, height: int) -> Image.Image:
    """Every pixel tells where it is."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 2, y * 2, 0 * x], 2).astype(np.uint8))


@pytest.mark.parametrize("rule", [*RULES])
@pytest.mark.parametrize("size", [(90, 40), (40, 40), (33, 96)])
def test_views_show_where_their_boxes_say(rule, size):
    """A gradient: the mean colour of a view is the middle of its box."""
    seen = look(picture(*size), rule, RULES[rule], pixels="raw")
    assert len(seen.views) == len(seen.boxes) == seen.plan.views
    for view, (x0, y0, x1, y1) in zip(seen.views, seen.boxes, strict=True):
        if x0 < 0 or y0 < 0 or x1 > size[0] + 0.5 or y1 > size[1] + 0.5:
            continue  # a black margin
        middle = view.mean((1, 2)) / 2
        assert abs(float(middle[0]) - (x0 + x1 - 1) / 2) < 1 and abs(float(middle[1]) - (y0 + y1 - 1) / 2) < 1
    side = {"llava_uhd": None, "slime": 32, "monkey": 32}[rule]
    assert side is None or all(view.shape == (3, side, side) for view in seen.views)


def test_margins_are_black_before_they_are_normalised():
    seen = look(picture(90, 20), "slime", RULES["slime"])
    black = images.normalise(np.zeros((1, 1, 3), dtype=np.uint8)).flatten()
    assert torch.equal(seen.views[1][:, 0, 0], black)
    assert seen.boxes[0] == (0.0, 0.0, 90.0, 20.0) and seen.boxes[1][1] < 0


def test_the_releases_of_llava_uhd_differ():
    early = look(picture(90, 40), "llava_uhd", {**UHD, "release": "original"}, pixels="unit")
    late = look(picture(90, 40), "llava_uhd", UHD)
    assert early.boxes[0][:2] == late.boxes[0][:2] == (0, 0)
    assert float(early.views[0].min()) >= 0 and float(early.views[0].max()) <= 1
    small = look(picture(20, 20), "llava_uhd", {**UHD, "release": "original"})
    assert len(small.views) == 1 and small.plan.overview_size is None


def test_fuyu_sees_the_picture_itself():
    seen = look(picture(50, 30), "fuyu", {"canvas": (128, 128), "patch": 8}, pixels="raw")
    assert torch.equal(seen.canvas, torch.from_numpy(np.array(picture(50, 30))).movedim(-1, 0).float())
    assert not seen.views and look(picture(100, 200), "fuyu", {"canvas": (128, 128)}).canvas.shape == (
        3,
        128,
        64,
    )
    with pytest.raises(ValueError, match="rule, pixels: got 'squares'"):
        look(picture(8, 8), "squares", {})


@pytest.fixture(scope="module")
def drawn() -> Cuttings:
    dataset = data.build("digits")
    tokenizer = Tokenizer.train(cuttings.texts(dataset), 507)
    return Cuttings(dataset, tokenizer, 0, opening=lambda words: [2, *words], end=(1,), seed=0)


def test_batches_are_the_same_again(drawn):
    one, two = drawn.instructions(3, 4), drawn.instructions(3, 4)
    assert torch.equal(one.input_ids, two.input_ids)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one.pictures, two.pictures, strict=True))
    assert len({picture.pixels.shape for picture in one.pictures}) > 1
    assert one.images.flatten().tolist() == [1, 2, 3, 4]
    for ids, labels, (start, end), shown in zip(
        one.input_ids, one.labels, one.answers, one.pictures, strict=True
    ):
        said = drawn.tokenizer.decode(ids[start : end - 1].tolist()).strip()
        assert said == (shown.page.text if shown.page else drawn.dataset.captions[shown.caption])
        assert torch.equal(labels[start:end], ids[start:end]) and ids[end - 1] == 1 and ids[0] == 2
        assert (labels != -100).sum() == end - start


def test_held_out_pages_are_others(drawn):
    known = {
        row.page.pixels.tobytes() for n in range(5) for row in drawn.instructions(n, 8).pictures if row.page
    }
    out = {
        row.page.pixels.tobytes() for n in range(5) for row in drawn.held_out_pages(n, 4).pictures if row.page
    }
    assert known and len(out) == 20 and not known & out


@pytest.mark.parametrize("name", ["llava_uhd-tiny", "slime-tiny", "monkey-tiny"])
def test_patches_hold_the_digits_that_are_there(drawn, name):
    config = models.config(name)
    rng = np.random.default_rng(0)
    for _ in range(4):
        page = pages.page(rng)
        row = Cutting(page.pixels, 20, page)
        seen = look(Image.fromarray(page.pixels), **config.look)  # type: ignore[union-attr]
        held = drawn.patches(row, seen, 8)
        assert [k.shape[:2] for k in held] == [(v.shape[1] // 8, v.shape[2] // 8) for v in seen.views]
        found = {int(k) - 20 for part in held for k in part.unique() if k < 30}
        assert found <= set(page.digits) and found
    photo = drawn.shown(0, 1)[0]
    held = drawn.patches(photo, look(Image.fromarray(photo.pixels), **config.look), 8)  # type: ignore[union-attr]
    assert all((part == photo.caption).all() for part in held)


def test_tokens_of_the_tiny_models_are_those_of_the_tokenizer():
    for name in ("llava_uhd-tiny", "slime-tiny", "monkey-tiny", "fuyu-tiny"):
        assert models.config(name).tokens == Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0)
