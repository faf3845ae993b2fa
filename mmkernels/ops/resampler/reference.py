"""Few queries over long media, the law.

Q-Former: which rows see which keys, N queries before L text tokens in every sample.

    mode        query -> query   query -> text   text -> query   text -> text
    itc         all              -               -               valid
    itg         all              -               all             valid, up to itself
    itm         all              valid           all             valid
"""

from __future__ import annotations

import torch
from torch import Tensor


def qformer_intervals(
    text_mask: Tensor, num_query: int, split: bool, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi int32 and order int64, each [B, N + L]: row r sees the keys order[lo[r]], ..., order[hi[r] - 1].

    The order puts a sample's valid text right behind its queries and padding last, so that what a row sees is one run.
    """
    b, length = text_mask.shape
    valid = text_mask.long()
    so_far, total = valid.cumsum(1), valid.sum(1, keepdim=True)
    padding_so_far = (1 - valid).cumsum(1)
    place = torch.where(text_mask, so_far, total + padding_so_far) - 1
    text = torch.arange(length, device=valid.device).expand(b, length)
    text_order = torch.zeros_like(place).scatter(1, place, text)
    queries = torch.arange(num_query, device=valid.device).expand(b, num_query)
    order = torch.cat([queries, num_query + text_order], 1)

    query_sees = (torch.zeros_like(total) if split or causal else total).expand(b, num_query)
    text_sees = so_far if causal else total.expand(b, length)
    hi = num_query + torch.cat([query_sees, text_sees], 1)
    lo = torch.cat([torch.zeros_like(query_sees), torch.full_like(text_sees, num_query if split else 0)], 1)
    return lo.int(), hi.int(), order
