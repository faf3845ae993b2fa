"""Pages of text, the views of a picture, and batches of both: every digit is where it is said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels import data
from mmkernels.data import pages
from mmkernels.data.readings import Readings, Sight
from mmkernels.data.views import maps, plan_of, views

PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
SIGHTS = {
    "square": Sight("square", 32, 8),
    "pad": Sight("pad", 32, 8),
    "anyres": Sight("anyres", 32, 8, PINPOINTS),
}


def _page(seed: int = 0, **how) -> pages.Page:
    return pages.page(np.random.default_rng(seed), **how)


def test_a_page_shows_its_digits_where_it_says():
    for seed in range(20):
        page = _page(seed)
        height, width, _ = page.pixels.shape
        assert (width, height) in pages.SIZES and (height, width) in pages.SIZES
        ground = page.pixels[0, 0].astype(int)
        ink = np.abs(page.pixels.astype(int) - ground).sum(-1) > 60
        for x, y in page.centres:
            near = ink[max(0, int(y) - 4) : int(y) + 5, max(0, int(x) - 4) : int(x) + 5]
            assert near.sum() > 5
        left, right = min(x for x, _ in page.centres), max(x for x, _ in page.centres)
        assert not ink[:, : max(0, int(left) - 6)].any() and not ink[:, int(right) + 4 :].any()
        middle = (width - min(width, height)) / 2
        assert middle + 4 <= left and right <= width - middle - 4
        assert page.text == " ".join(map(str, page.digits))
    assert np.array_equal(_page(3).pixels, _page(3).pixels)
    assert _page(size=(40, 64)).pixels.shape == (64, 40, 3)


def test_a_full_page_has_lines_of_digits():
    page = _page(size=(64, 48), full=True)
    assert len(page.digits) == len(page.centres) > 8 and set(page.digits) <= set(range(10))
    height, width, _ = page.pixels.shape
    assert all(4 <= x <= width - 4 and 4 <= y <= height - 4 for x, y in page.centres)
    assert len({y for _, y in page.centres}) > 1


@pytest.mark.parametrize("size", [(32, 64), (96, 40), (50, 50), (41, 33), (64, 64)])
def test_views_are_the_published_ones(size):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    )
    bicubic, (w, h) = Image.Resampling.BICUBIC, size
    scaled = (int(32 * w / min(size)), int(32 * h / min(size)))
    left, top = (scaled[0] - 32) // 2, (scaled[1] - 32) // 2
    middle = np.asarray(image.resize(scaled, bicubic))[top : top + 32, left : left + 32]
    assert np.array_equal(views(image, "square", 32), middle[None])
    square = np.empty((max(size), max(size), 3), np.uint8)
    square[:] = (122, 116, 104)
    y, x = (max(size) - h) // 2, (max(size) - w) // 2
    square[y : y + h, x : x + w] = np.asarray(image)
    padded = Image.fromarray(square).resize((32, 32), bicubic)
    assert np.array_equal(views(image, "pad", 32), np.asarray(padded)[None])
    plan = plan_of(w, h, PINPOINTS, 32, 8)
    seen = views(image, "anyres", 32, plan)
    assert np.array_equal(seen[0], np.asarray(image.resize((32, 32), bicubic)))
    canvas = np.zeros((plan.grid[1] * 32, plan.grid[0] * 32, 3), np.uint8)
    (x, y), (nw, nh) = plan.offset, plan.resized
    canvas[y : y + nh, x : x + nw] = np.asarray(image.resize(plan.resized, bicubic))
    rows = canvas.reshape(plan.grid[1], 32, plan.grid[0], 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    assert np.array_equal(seen[1:], rows)


@pytest.mark.parametrize("aspect", SIGHTS)
def test_places_of_a_picture_are_known_in_its_views(aspect):
    sight = SIGHTS[aspect]
    for seed, (w, h) in enumerate([(96, 40), (40, 96), (60, 60)]):
        x, y = (
            np.random.default_rng(seed).uniform((w - min(w, h)) / 2 + 4, (w + min(w, h)) / 2 - 4),
            h / 2 + 3,
        )
        pixels = np.zeros((h, w, 3), np.uint8)
        pixels[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2, 0] = 255  # red: padding is grey
        plan, found = sight.plan(w, h), 0
        seen = views(Image.fromarray(pixels), aspect, 32, plan)
        red = seen[..., 0].astype(int) - seen[..., 1]
        for view, (a, b, c, d) in zip(red, maps(w, h, aspect, 32, plan), strict=True):
            at = (a * (int(x) + 0.5) + b, c * (int(y) + 0.5) + d)
            if all(2 <= p < 30 for p in at):
                found += 1
                bright = np.argwhere(view > 0.7 * view.max())[:, ::-1] + 0.5
                assert np.abs(bright.mean(0) - at).max() < 1.0
        assert found >= 1


def _ask(question: str) -> list[int]:
    return [40, 2, 41]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Readings]:
    dataset = data.build("digits")
    tokenizer = data.Tokenizer.train([*dataset.captions, *(f" {n} {n}" for n in range(10))], 512)
    return {name: Readings(dataset, tokenizer, sight, ask=_ask) for name, sight in SIGHTS.items()}


@pytest.mark.parametrize("aspect", SIGHTS)
def test_a_batch_of_readings(drawn, aspect):
    readings = drawn[aspect]
    batch = readings.instructions(3, 6)
    places = (batch.input_ids == 2).sum(1)
    if aspect == "anyres":
        assert batch.plans is not None and places.tolist() == [plan.tokens for plan in batch.plans]
        assert len(set(places.tolist())) > 1
        assert batch.images.shape[1] == max(plan.views for plan in batch.plans)
    else:
        assert batch.plans is None and batch.images.shape == (6, 1, 3, 32, 32)
    assert len(batch.kinds) == int(places.sum())
    said = [readings.tokenizer.decode(row[row != -100].tolist()).strip() for row in batch.labels]
    for row, text in enumerate(said):
        caption = int(batch.captions[row])
        if row % 2:
            assert readings.dataset.captions[caption] == "a page" and text[1] == " " and text[::2].isdigit()
        else:
            assert readings.dataset.captions[caption] == text
    again = readings.instructions(3, 6)
    assert torch.equal(batch.images, again.images) and torch.equal(batch.input_ids, again.input_ids)
    plain = readings.pairs(3, 2)
    assert plain.input_ids[0, 0] == 2 and plain.input_ids[plain.labels != -100][-1] in (1, 3)


def test_digits_are_known_at_their_places(drawn):
    """On a page of two tiles' size a digit has one place in the tiles and one in the whole picture."""
    readings = drawn["anyres"]
    batch = readings.held_out_pages(0, 8, (64, 32))
    first = len(readings.dataset.captions) - 1
    start = 0
    for row, plan in enumerate(batch.plans):
        kinds = batch.kinds[start : start + plan.tokens]
        start += plan.tokens
        digits = readings.tokenizer.decode(batch.labels[row][batch.labels[row] != -100].tolist()).split()
        shown = kinds[16:].flatten()
        shown = shown[shown != readings.nothing] - first
        assert shown.tolist() == [int(d) for d in digits]
        assert (kinds[:16] != readings.nothing).sum() >= 1
    alone = readings.held_out_pages(0, 8, (64, 32), sliced=False)
    assert alone.plans is None and alone.images.shape == (8, 1, 3, 32, 32)
    assert (alone.input_ids == 2).sum(1).tolist() == [17] * 8
    assert torch.equal(alone.images[:, 0], batch.images[:, 0])


def test_photographs_hold_their_caption_everywhere(drawn):
    views_, kinds = drawn["pad"].shown(0, 4)
    assert views_.shape == (4, 3, 32, 32) and kinds.shape == (4, 16, 2)
    assert bool((kinds[0] == kinds[0, 0, 0]).all()) and int(kinds[0, 0, 0]) < 20
    assert bool((kinds[1::2] >= 20).all())
    echo = drawn["pad"].echoes(1, 4)
    assert echo.images.shape[1] == 0 and echo.kinds.shape == (64, 2)
    larger = drawn["pad"].at(48)
    assert larger.pairs(0, 1).images.shape == (1, 1, 3, 48, 48)


def test_what_does_not_fit_is_refused_by_name():
    image = Image.new("RGB", (64, 64))
    plan = plan_of(64, 64, PINPOINTS, 32, 8)
    for match, call in (
        ("aspect: got 'wide'", lambda: views(image, "wide", 32)),
        ("plan: got None for 'anyres'", lambda: views(image, "anyres", 32)),
        (r"plan: got \(2, 2\) for 'pad'", lambda: maps(64, 64, "pad", 32, plan)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
