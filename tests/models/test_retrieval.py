"""Recall on a matrix known by hand, and the best by contrast re-ranked by matching."""

from __future__ import annotations

import pytest
import torch

from mmkernels import models
from mmkernels.models.retrieval import contrast_scores, match_scores, recall


def test_recall_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.3, 0.3, 0.1], [1.0, 0.0, 0.0]])
    relevant = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]) > 0
    # row 0 at once; row 1 second; row 2 second, for of equal scores the first is better; row 3 does not count
    assert recall(scores, relevant, 1) == pytest.approx(1 / 3)
    assert recall(scores, relevant, 2) == recall(scores, relevant, 9) == 1.0
    assert recall(scores.T, relevant.T, 1) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="k: got 0"):
        recall(scores, relevant, 0)
    with pytest.raises(ValueError, match="relevant: got shape"):
        recall(scores, relevant.T, 1)


@torch.no_grad()
def test_the_best_are_re_ranked_by_matching():
    """`logit of yes + contrast` for the two best of each row, -100 for the others."""
    torch.manual_seed(0)
    model = models.build("blip2-tiny").eval()
    image = model.image_features(torch.randn(3, 3, 32, 32))
    ids = torch.randint(4, 500, (4, 5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 3:] = False
    scores = contrast_scores(model.qformer, model.heads, image, ids, mask)
    assert scores.shape == (3, 4) and scores.abs().max() <= 1 + 1e-5
    texts, images = match_scores(model.qformer, model.heads, image, ids, mask, scores, k=2)
    assert texts.shape == (3, 4) and images.shape == (4, 3)
    for n in range(3):
        for m in range(4):
            yes = model.heads.match(model.qformer, image[n : n + 1], ids[m : m + 1], mask[m : m + 1])[0, 1]
            expected = yes + scores[n, m]
            for found, best in ((texts[n, m], scores[n].topk(2)), (images[m, n], scores[:, m].topk(2))):
                own = scores[n, m] >= best.values.min()
                torch.testing.assert_close(
                    found, expected if own else torch.tensor(-100.0), rtol=1e-4, atol=1e-4
                )
