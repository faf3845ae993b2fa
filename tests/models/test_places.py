"""One image token becomes the places that a picture takes, in every family."""

from __future__ import annotations

import pytest
import torch
from tiny import text_ids

from mmkernels import models
from mmkernels.models.base import Tokens
from mmkernels.models.places import expand_images, pad_rows

TOKENS = Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0)


def test_a_number_of_places() -> None:
    ids = text_ids("aIbE..", "abcIdE")
    out = expand_images(ids, TOKENS, 3, attention_mask=ids != 0, labels=ids)
    assert torch.equal(out.ids, text_ids("aIIIbE..", "abcIIIdE"))
    assert torch.equal(out.mask, out.ids != 0)
    text = out.mask & (out.ids != 2)
    assert out.labels is not None and torch.equal(out.labels, torch.where(text, out.ids, -100))
    assert expand_images(text_ids("Ia"), TOKENS, 1).labels is None


def test_places_of_other_ids() -> None:
    model = models.build("qwen_vl-tiny")
    written = model.marks.image(TOKENS, 3)  # type: ignore[operator]
    assert written == [2, 508, 508, 508, 507]
    ids, mask = model.expand(text_ids("aIbI", "..Ia", "abcd", "Ic.."))
    slots = [2, *[508] * 16, 507]
    rows = [[97, *slots, 98, *slots], [*slots, 97], [97, 98, 99, 100], [*slots, 99]]
    assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == rows
    assert mask.sum(1).tolist() == [38, 19, 4, 19]  # padding ends every row
    out = expand_images(text_ids("aIb"), TOKENS, written, labels=text_ids("aIb"))
    assert out.ids.tolist() == [[97, *written, 98]] and out.labels.tolist() == [[97, *[-100] * 5, 98]]


def test_every_family_makes_its_places_so() -> None:
    for name, places in (
        ("blip2-tiny", 8),
        ("blip2-t5-tiny", 8),
        ("xcomposer-tiny", 14),
        ("llama-vid-tiny", 2),
    ):
        ids, mask = models.build(name).expand(text_ids("aIb", "Ia."), text_ids("aIb", "Ia.") != 0)
        assert ids.tolist() == [[97, *[2] * places, 98], [*[2] * places, 97, 0]], name
        assert mask.sum(1).tolist() == [places + 2, places + 1]


def test_nothing_to_expand() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    out = expand_images(none, TOKENS, 2, labels=none)
    assert out.ids.shape == out.mask.shape == out.labels.shape == (0, 0)
    hidden = expand_images(text_ids("aI"), TOKENS, 2, attention_mask=torch.zeros(1, 2, dtype=torch.bool))
    assert hidden.ids.shape == (1, 0)
    assert pad_rows([torch.tensor([7, 8]), torch.tensor([9])], 5)[0].tolist() == [[7, 8], [9, 5]]


@pytest.mark.parametrize("places", [0, ()])
def test_no_place_is_refused(places) -> None:
    with pytest.raises(ValueError, match="places: got 0"):
        expand_images(text_ids("aI"), TOKENS, places)
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        expand_images(text_ids("aI"), TOKENS, 2, attention_mask=torch.ones(1, 3, dtype=torch.bool))
