"""LLaVA's way from one image token a picture to embeddings, masks and labels, against the authors' steps."""

from __future__ import annotations

import pytest
import torch
from published_llava import spliced, spliced_by_yi

from mmkernels.models.llava import splice


def _batch(left: bool = False):
    """Two pictures, none, one; padded on a side. Pictures have different numbers of tokens."""
    rows = [[1, -200, 5, 6, -200, 7], [1, 8, 9, 0, 0, 0], [1, 4, -200, 3, 0, 0]]
    ids = torch.tensor(rows)
    mask = ids != 0
    if left:
        order = [[r for r in row if r == 0] + [r for r in row if r != 0] for row in rows]
        ids = torch.tensor(order)
        mask = ids != 0
    labels = torch.where(mask & (ids > 4), ids, -100)
    media = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 5, 3)]
    return ids, mask, labels, media, torch.randn(12, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [None, 3, 7])
@pytest.mark.parametrize("padded_left", [False, True])
def test_the_published_steps(side, max_length, padded_left):
    ids, mask, labels, media, table = _batch(padded_left)
    out = splice(
        ids, media, table, attention_mask=mask, labels=labels, max_length=max_length, padding_side=side
    )
    wanted = spliced(ids, mask, labels, media, table, max_length=max_length, left=side == "left")
    for ours, theirs in zip(
        (out.embeddings, out.attention_mask, out.labels, out.position_ids), wanted, strict=True
    ):
        assert torch.equal(ours, theirs)
    weight = torch.randn_like(out.embeddings)
    found = torch.autograd.grad((out.embeddings * weight).sum(), [*media, table])
    theirs = torch.autograd.grad((wanted[0] * weight).sum(), [*media, table], allow_unused=True)
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-12, atol=1e-12)
    assert not found[2].any()  # the row without a picture has used up the third


def test_the_older_rules_of_yi():
    ids, mask, labels, media, table = _batch()
    out = splice(ids, media, table, attention_mask=mask, labels=labels, release="yi_vl")
    wanted = spliced_by_yi(ids, mask, labels, media, table)
    for ours, theirs in zip(out[:3], wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_without_masks_labels_and_pictures():
    ids, _, _, media, table = _batch()
    out = splice(ids, media, lambda known: table[known])
    assert out.labels is None and out.attention_mask.sum(1).tolist() == [10, 6, 8]
    text = ids[1:2]
    out = splice(text, media[:1], table, labels=text)
    assert torch.equal(out.embeddings, table[text]) and torch.equal(out.labels, text)
    assert splice(ids[:0], [], table).embeddings.shape == (0, 0, 3)


def test_what_does_not_fit_is_refused_by_name():
    ids, _, labels, media, table = _batch()
    for match, call in (
        ("media: got 3 pictures, expected 4", lambda: splice(ids, media[:3], table)),
        (r"media\[0\]: got shape", lambda: splice(ids, [torch.zeros(2, 4), *media[1:]], table)),
        ("padding_side: got 'up'", lambda: splice(ids, media, table, padding_side="up")),
        ("release: got 'old'", lambda: splice(ids, media, table, release="old")),
        ("release: got 'yi_vl' beside", lambda: splice(ids, media, table, release="yi_vl", max_length=9)),
        ("labels", lambda: splice(ids, media, table, labels=labels[:2])),
    ):
        with pytest.raises(ValueError, match=match):
            call()
