"""Where LaVIN's modality and picture stand in a text, and what of that is refused."""

from __future__ import annotations

from typing import Any

import published_lavin as published
import pytest
import torch

from mmkernels import models
from mmkernels.models.lavin import insert_images
from mmkernels.models.lavin_text import lay_out

TINY: Any = models.config("lavin-tiny")
SOME, NONE = torch.tensor([90, 91]), torch.tensor([90, 92, 93])


def test_ids_by_example():
    x, labels = torch.tensor([[1, 10, 11, 12, 13, 14]] * 2), torch.tensor([[0, 0, 0, 12, 13, 14]] * 2)
    images = torch.tensor([[-7, -8]] * 2)
    rows, answers = insert_images(x, labels, images, SOME, NONE, torch.tensor([1, 0]))
    assert rows.tolist() == [[1, 90, 91, -7, -8, 10], [1, 90, 92, 93, 10, 11]]
    assert answers is not None and answers.tolist() == [[0] * 6, [0] * 6]
    kind = torch.tensor([77, 78])
    rows, answers = insert_images(
        x, labels, images, SOME, NONE, torch.tensor([True, False]), modality=kind, length=12
    )
    assert rows.tolist() == [
        [77, 1, 90, 91, -7, -8, 10, 11, 12, 13, 14, 0], [78, 1, 90, 92, 93, 10, 11, 12, 13, 14, 0, 0],
    ]  # fmt: skip
    assert answers is not None and answers.tolist() == [
        [0] * 8 + [12, 13, 14, 0],
        [0] * 7 + [12, 13, 14, 0, 0],
    ]
    assert insert_images(x, None, images, SOME, NONE, torch.tensor([1, 0]))[1] is None


def test_embeddings_as_published():
    g = torch.Generator().manual_seed(0)
    x, images = (torch.randn(4, n, 5, generator=g, requires_grad=True) for n in (9, 3))
    some, none = (torch.randn(n, 5, generator=g, requires_grad=True) for n in (2, 4))
    labels, has = torch.randint(0, 9, (4, 9), generator=g), [1, 0, 0, 1]
    rows, answers = insert_images(x, labels, images, some, none, torch.tensor(has))
    expected, theirs = published.insert(x, labels, images, some, none, has)
    assert torch.equal(rows, expected) and answers is not None and torch.equal(answers, theirs)
    inputs = (x, images, some, none)
    dy = torch.randn(rows.shape, generator=g)
    for ours, grad in zip(
        torch.autograd.grad(rows, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(ours, grad)
    graph = torch.compile(insert_images, backend="eager", fullgraph=True)
    assert torch.equal(graph(x, labels, images, some, none, torch.tensor(has))[0], rows)


def test_whole_rows_for_prompts():
    tokens, marks = TINY.tokens, TINY.marks
    ids = torch.tensor([[2, 40, 41, 0, 0], [0, 0, 50, 51, 52], [1, 60, 2, 61, 0], [0, 0, 0, 0, 0]])
    labels = torch.where(ids > 40, ids, 0)
    rows = lay_out(ids, tokens, marks, 3, attention_mask=ids != 0, labels=labels)
    m, a, b, c = marks.modality, *marks.image_prefix, marks.text_prefix[1]
    assert rows.ids.tolist() == [
        [m, 1, a, b, 2, 2, 2, 40, 41],
        [m, 1, a, c, 50, 51, 52, 0, 0],
        [m, 1, a, b, 2, 2, 2, 60, 61],
        [m, 1, a, c, 0, 0, 0, 0, 0],
    ]
    assert rows.mask.sum(1).tolist() == [9, 7, 9, 4]
    assert rows.labels is not None and rows.labels.tolist() == [
        [0] * 8 + [41], [0] * 4 + [50, 51, 52, 0, 0], [0] * 7 + [60, 61], [0] * 9,
    ]  # fmt: skip
    assert lay_out(ids[:0], tokens, marks, 3).ids.shape == (0, 5)
    unmasked = lay_out(ids[:1], tokens, marks, 3)  # without a mask padding is text
    assert unmasked.ids.tolist() == [[m, 1, a, b, 2, 2, 2, 40, 41, 0, 0]] and unmasked.mask.all()


def test_bad_input_is_refused_by_name():
    model: Any = models.build("lavin-tiny").eval()
    ids, _ = model.expand(torch.tensor([[2, 40, 41], [50, 51, 52]]), torch.ones(2, 3, dtype=torch.bool))
    images = torch.zeros(2, 1, 3, 32, 32)
    short, text = ids[:1, [0, 1, 2, 3, 4, 5, 8, 9]], ids[1:]
    x, twice = torch.zeros(2, 5, 4), torch.tensor([[7], [508]])
    insert = (x, None, x[:, :2], x[0], x[0], torch.ones(2))
    for match, call in (
        (r"input_ids: row 0 has 0 modality places \(508\), expected one", lambda: model(images, torch.tensor([[1, 40]] * 2))),
        ("input_ids: row 1 has 2 modality places", lambda: model(images, torch.cat([ids, twice], 1))),
        ("input_ids: row 0 has 2 image tokens, expected 4", lambda: model(images[:1], short)),
        ("images: got 0 a row, and 1 rows of input_ids with places", lambda: model(None, ids)),
        ("images: got 0 a row, and 1 rows", lambda: model(images[:, :0], ids)),
        ("images: got 1 a row, and 0 rows of input_ids with places", lambda: model(images[:1], text)),
        ("images: got 2 a row, expected one at most", lambda: model(torch.zeros(2, 2, 3, 32, 32), ids)),
        ("images: got shape", lambda: model(images[:, 0], ids)),
        ("media: got shape", lambda: model(images[:1], ids)),
        ("media: got shape", lambda: model(None, ids, media=torch.zeros(2, 1, 3, 128))),
        ("input_ids: got ids 0 to 600", lambda: model(None, torch.tensor([[508, 1, 600]]))),
        ("input_ids: row 0 has 2 image tokens, expected one at most", lambda: model.expand(torch.tensor([[2, 2, 40]]))),
        ("labels: got shape", lambda: model(images, ids, labels=ids[:, :3])),
        ("labels: got shape", lambda: insert_images(x, torch.zeros(2, 4), *insert[2:])),
        ("images: got shape", lambda: insert_images(x, None, x[:1], *insert[3:])),
        ("has_image: got shape", lambda: insert_images(*insert[:-1], torch.ones(3))),
        ("modality: got shape", lambda: insert_images(*insert, modality=x)),
        ("decode_lag: got 2", lambda: models.build(models.LavinConfig(**(vars(TINY) | {"decode_lag": 2})))),
        ("vision: got class_every None", lambda: models.build(
            models.LavinConfig(**(vars(TINY) | {"vision": models.config("flamingo-tiny").vision})))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="labels: got"):
        model(images, ids, labels=ids.float())
    assert model(images[:0], ids[:0]).logits.shape == (0, ids.shape[1], 512)


def test_nothing_to_predict_is_no_loss():
    model: Any = models.build("lavin-tiny").eval()
    ids, _ = model.expand(torch.tensor([[50, 51, 52]]))
    assert model(None, ids, labels=torch.zeros_like(ids)).loss == 0
    published_and_ours = torch.where(ids == 52, ids, 0), torch.where(ids == 52, ids, -100)
    a, b = (model(None, ids, labels=labels).loss for labels in published_and_ours)
    assert a == b and a > 0
