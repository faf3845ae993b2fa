"""Scenes: numbered, their boxes true to the pixels, their text as CogVLM writes it, and boxes read back and compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels import data
from mmkernels.data.grounding import QUESTION, SIDES, box_text, boxes_in, iou, texts


@pytest.fixture(scope="module")
def grounding(digits):
    return data.Grounding(digits, data.Tokenizer.train(digits.captions, 512), 48, places=5)


def test_batches_are_numbered(grounding):
    for draw in (grounding.captions, grounding.boxes, lambda *at: grounding.echoes(*at)[0]):
        one, again, other = draw(3, 4), draw(3, 4), draw(4, 4)
        for name, value in vars(one).items():
            assert torch.equal(value, getattr(again, name)), name
        assert not torch.equal(one.boxes, other.boxes)
    assert not torch.equal(grounding.boxes(3, 4).images, grounding.held_out_boxes(3, 4).images)
    assert not torch.equal(grounding.captions(3, 4).images, grounding.held_out(3, 4).images)
    pixels, captions, boxes = grounding.scenes(0, 3)
    assert (pixels.shape, captions.shape, boxes.shape) == ((3, 3, 48, 48), (3, 2), (3, 2, 4))
    assert torch.equal(grounding.scenes(0, 3)[0], pixels)


def test_objects_are_where_their_boxes_say(grounding, monkeypatch):
    """Pictures in the colour of their caption's number: it fills the box, and nothing outside of the boxes has it."""

    def painted(self, rng, size, held_out):
        number = int(rng.integers(250, 254))
        return np.full((size, size, 3), number, np.uint8), number

    monkeypatch.setattr(type(grounding.dataset), "draw", painted)
    monkeypatch.setattr(data.grounding, "view", lambda *a, **k: np.zeros((48, 48, 3), np.uint8))
    rng, low, high = np.random.default_rng(0), *(round(48 * side) for side in SIDES)
    corners = []
    for _ in range(64):
        scene = grounding.scene(rng, 2)
        rest = scene.pixels.copy()
        for caption, box in zip(scene.captions, scene.boxes, strict=True):
            x0, y0, x1, y1 = (round(48 * side) for side in box)
            assert low <= x1 - x0 <= high and low <= y1 - y0 <= high
            assert (scene.pixels[y0:y1, x0:x1] == caption).all()
            assert (rest[y0:y1, x0:x1] != 0).all()  # nor over another object
            rest[y0:y1, x0:x1] = 0
            corners.append((x0, y0))
        assert not rest.any() and len(set(scene.captions)) == 2
    assert np.ptp(np.array(corners), axis=0).min() > 24


def test_a_number_of_the_texts_is_one_token(digits):
    tokenizer = data.Tokenizer.train(texts(digits, 48), 512)
    for box in ((0, 0.0625, 0.5, 1), (7 / 48, 11 / 48, 13 / 48, 47 / 48)):
        assert len(tokenizer.encode(box_text(box))) == 9  # the brackets, four numbers, three commas
    assert len(tokenizer.encode(QUESTION.format(digits.captions[3]))) == 6


def test_the_mean_box_is_the_middle(grounding):
    torch.testing.assert_close(grounding.mean_box(), torch.tensor([0.3, 0.3, 0.7, 0.7]), atol=0.03, rtol=0)
    assert torch.equal(grounding.mean_box(), grounding.mean_box())


def test_held_out_scenes_are_of_held_out_pictures(grounding, monkeypatch):
    seen = []
    draw, cut = type(grounding.dataset).draw, data.grounding.view
    monkeypatch.setattr(
        type(grounding.dataset),
        "draw",
        lambda *a, held_out: seen.append(held_out) or draw(*a, held_out=held_out),
    )
    monkeypatch.setattr(
        data.grounding, "view", lambda *a, held_out: seen.append(held_out) or cut(*a, held_out=held_out)
    )  # fmt: skip
    for held_out, draws in (
        (False, (grounding.captions, grounding.boxes, grounding.scenes)),
        (True, (grounding.held_out, grounding.held_out_boxes)),
    ):
        seen.clear()
        for one in draws:
            one(0, 2)
        assert seen and set(seen) == {held_out}


def test_the_text_is_beginning_places_question_answer(grounding, digits):
    t = grounding.tokenizer
    for asks, batch in ((False, grounding.captions(0, 8)), (True, grounding.boxes(0, 8))):
        for b in range(8):
            ids, (start, end) = batch.input_ids[b].tolist(), batch.answers[b].tolist()
            name = digits.captions[batch.captions[b]]
            assert ids[:6] == [t.end_of_text, *[t.image] * 5]
            assert t.decode(ids[6:start]) == (QUESTION.format(name) if asks else "")
            told = t.decode(ids[start:end])
            assert told == (box_text(batch.boxes[b].tolist()) if asks else name)
            assert ids[end - 1] == t.end_of_text and not batch.attention_mask[b, end:].any()
            assert (batch.labels[b] != -100).nonzero().flatten().tolist() == list(range(start, end))
            assert torch.equal(batch.labels[b, start:end], batch.input_ids[b, start:end])


def test_echoes_come_with_what_their_scenes_show(grounding, digits):
    (batch, captions, boxes), t = grounding.echoes(0, 32), grounding.tokenizer
    asked = 0
    for b in range(32):
        ids, (start, end) = batch.input_ids[b].tolist(), batch.answers[b].tolist()
        own, name = batch.captions[b], digits.captions[batch.captions[b]]
        question, there = t.decode(ids[6:start]), (boxes[b, :, 2:] > boxes[b, :, :2]).all(1)
        assert question == (QUESTION.format(name) if there.all() else "") and there[0]
        assert t.decode(ids[start:end]) == (box_text(batch.boxes[b].tolist()) if question else name)
        assert torch.equal(boxes[b][there & (captions[b] == own)], batch.boxes[b : b + 1])
        asked += bool(question)
    assert 8 < asked < 24 and batch.images.shape[1] == 0


def test_boxes_as_text():
    assert box_text((0, 0.0625, 0.9999, 1)) == "[[000,062,999,999]]"
    assert box_text((0, 0, 0.5, 0.5), (0.25, 0.5, 1, 1)) == "[[000,000,500,500;250,500,999,999]]"
    assert boxes_in("at [[000,062,999,999]] and [[100,200,300,400;500,600,700,800]]") == [
        (0, 0.062, 0.999, 0.999), (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8),
    ]  # fmt: skip
    assert boxes_in("[[1,2,3,4]] [[100,200,300]] [[1000,200,300,400]] [100,200,300,400] [[]]") == []
    for match, call in (
        ("boxes: got none", box_text),
        ("box: got", lambda: box_text((0.5, 0, 0.4, 1))),
        ("box: got", lambda: box_text((0, 0, 1.1, 1))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_intersection_over_union():
    a = torch.tensor(
        [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64
    )
    b = torch.tensor(
        [[1, 1, 3, 3], [0, 0, 2, 2], [1, 0, 2, 1], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.float64
    )
    assert iou(a, b).tolist() == [pytest.approx(1 / 7), 1, 0, 0, 0]
    assert iou(a[:, None], b[None]).shape == (5, 5)
    with pytest.raises(ValueError, match="b: got shape"):
        iou(a, b[:, :3])


def test_a_canvas_shows_nothing_that_has_a_caption(digits):
    known = {Image.fromarray(p.pixels).resize((8, 8)).tobytes() for group in digits.train[10:] for p in group}
    assert not any(
        Image.fromarray(c.pixels).resize((8, 8)).tobytes() in known for c in data.grounding.canvases()
    )
