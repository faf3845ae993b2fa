"""Finding texts by images and images by texts, as BLIP-2 is evaluated: by contrast, then the best of them by matching."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.layers.qformer import QFormer
from mmkernels.models.qformer_stage1 import Stage1Heads, similarity

_OUT = -100.0  # the published score of what matching was not asked about


@torch.no_grad()
def contrast_scores(
    qformer: QFormer, heads: Stage1Heads, image: Tensor, ids: Tensor, mask: Tensor | None
) -> Tensor:
    """`[N, M]`: image tokens `[N, P, Cv]` against texts `[M, L]`, the best query of each; no temperature."""
    return similarity(heads.image_features(qformer(image)), heads.text_features(qformer, ids, mask))


@torch.no_grad()
def match_scores(
    qformer: QFormer,
    heads: Stage1Heads,
    image: Tensor,
    ids: Tensor,
    mask: Tensor,
    scores: Tensor,
    k: int = 128,
) -> tuple[Tensor, Tensor]:
    """Contrast scores `[N, M]` -> the same for images to texts `[N, M]` and for texts to images `[M, N]`, best `k` re-ranked.

    The k best of a row score `itm logit of "yes" + contrast`, all others -100. **Edge** k beyond a row takes all of it.
    **Raises** ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more")
    texts, images = torch.full_like(scores, _OUT), torch.full_like(scores.T, _OUT)
    for row, best in enumerate(scores.topk(min(k, scores.shape[1]), 1).indices):
        yes = heads.match(qformer, image[row].expand(len(best), -1, -1), ids[best], mask[best])[:, 1]
        texts[row, best] = yes.to(scores.dtype) + scores[row, best]
    for row, best in enumerate(scores.T.topk(min(k, scores.shape[0]), 1).indices):
        many = (t[row].expand(len(best), -1) for t in (ids, mask))
        yes = heads.match(qformer, image[best], *many)[:, 1]
        images[row, best] = yes.to(scores.dtype) + scores[best, row]
    return texts, images


def recall(scores: Tensor, relevant: Tensor, k: int) -> float:
    """Share of the rows of scores `[N, M]` that have something relevant (bool `[N, M]`) among their k best.

    **Edge** rows to which nothing is relevant are left out; of equal scores the first counts as better. **Raises** ValueError
    for k < 1 and for shapes.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected 1 or more")
    if scores.shape != relevant.shape or scores.dim() != 2:
        raise ValueError(
            f"relevant: got shape {tuple(relevant.shape)}, expected [N, M] = {tuple(scores.shape)}"
        )
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    rows = relevant.any(1)
    hits = relevant.gather(1, order).any(1)
    return float(hits[rows].double().mean()) if bool(rows.any()) else 0.0
