"""Who sees whom in a Q-Former: `qformer_intervals`, the metadata all layers share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.resampler import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

MODES = ("itc", "itg", "itm", "instruct")


class QFormerIntervals(NamedTuple):
    """Row r of a sample sees the keys `order[lo[r]], ..., order[hi[r] - 1]`; lo, hi int32 and order int64, each [B, R].

    Rows and keys are numbered alike, queries first. Keys are brought into the order once, before the first layer: a stack
    without positions of its own gives every token the same result wherever it stands.
    """

    lo: Tensor
    hi: Tensor
    order: Tensor

    def in_order(self) -> tuple[Tensor, Tensor]:
        """lo and hi of rows that stand in the order of the keys."""
        return self.lo.gather(1, self.order), self.hi.gather(1, self.order)


def _fake(text_mask: Tensor, num_query: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (text_mask.shape[0], num_query + text_mask.shape[1])
    lo = text_mask.new_empty(shape, dtype=torch.int32)
    return lo, torch.empty_like(lo), text_mask.new_empty(shape, dtype=torch.int64)


QFORMER_INTERVALS = Op(
    "qformer_intervals(Tensor text_mask, int num_query, bool split, bool causal) -> (Tensor lo, Tensor hi, Tensor order)",
    reference.qformer_intervals,
    fake=_fake,
)


def qformer_intervals(mode: str, num_query: int, text_mask: Tensor) -> QFormerIntervals:
    """The Q-Former's self-attention masks as intervals, with the key order that makes every one of them a single run.

    "itc" keeps queries and text apart; "itg" hides the text from the queries and lets text see the queries and the text up to
    itself; "itm" (and "instruct", InstructBLIP's) shows everything to everyone. Padding is hidden from all in all of them.

    **Shapes** text_mask `[B, L]`, True at text; lo, hi, order `[B, num_query + L]`, queries first, local to the sample: the
    4-D form of `interval_attention` takes them with keys gathered by `order`.
    **Dtypes** bool in; int32, int32, int64 out. **Gradient** none.
    **Edge** padding may stand left, right or in between; its rows see what text there would see. Without valid text "itc"
    gives text rows nothing (exact zeros), the other modes the queries. num_query 0 or L 0: only text, only queries.
    **Raises** ValueError for shapes, modes and sizes; TypeError for dtypes.
    **Source** BLIP-2 (arXiv 2301.12597) figure 2; InstructBLIP (arXiv 2305.06500).
    **Speed** metadata: O(rows) by prefix sums, no host sync, shared by all layers.
    """
    _check.choice("mode", mode, MODES)
    _check.shapes(text_mask=(text_mask, "B L"))
    _check.dtypes((torch.bool,), text_mask=text_mask)
    if num_query < 0:
        raise ValueError(f"num_query: got {num_query}, expected 0 or more")
    return QFormerIntervals(*QFORMER_INTERVALS(text_mask, num_query, mode == "itc", mode == "itg"))
