"""Where pictures stand in a text: one token becomes as many places as a picture has tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.base import IGNORE, Tokens
from mmkernels.primitives import _check


class Expanded(NamedTuple):
    """ids int64, mask bool and labels int64 or None, each `[B, T]`, padded on the right."""

    ids: Tensor
    mask: Tensor
    labels: Tensor | None


def expand_images(
    input_ids: Tensor,
    tokens: Tokens,
    places: int | Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Expanded:
    """Makes each `tokens.image` a run of `places`: so many of itself, or the ids that a family writes instead (Qwen-VL).

    `counts` instead gives every image of the batch, in its order, so many of itself as it has there.

    **Shapes** input_ids, attention_mask (True at text; None: all is), labels `[B, T]`. **Edge** places have the label -100;
    padding of the input is dropped; no rows give no rows. **Raises** ValueError for shapes and for fewer than one place.
    """
    _check.shapes(
        input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"), labels=(labels, "B T")
    )
    run = [tokens.image] * places if isinstance(places, int) else [*places]
    _check.positive(places=len(run))
    written = torch.tensor(run, dtype=input_ids.dtype, device=input_ids.device)
    sizes = None if counts is None else _sizes(input_ids, tokens, counts, attention_mask)
    rows, answers = [], []
    for b, ids in enumerate(input_ids):
        keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask[b]
        image = ids[keep] == tokens.image
        times = torch.where(image, len(run), 1)
        if sizes is not None:
            times[image] = sizes[b]
        wide = image.repeat_interleave(times)
        row = ids[keep].repeat_interleave(times)
        if sizes is None:
            row[wide] = written.repeat(int(image.sum()))
        rows.append(row)
        if labels is not None:
            answers.append(labels[b][keep].repeat_interleave(times).masked_fill(wide, IGNORE))
    ids, mask = pad_rows(rows, tokens.pad, like=input_ids)
    made = None if labels is None else pad_rows(answers, IGNORE, like=labels)[0]
    return Expanded(ids, mask, made)


def _sizes(ids: Tensor, tokens: Tokens, counts: Sequence[int], mask: Tensor | None) -> tuple[Tensor, ...]:
    """The counts of each row's images."""
    image = ids == tokens.image
    rows = (image if mask is None else image & mask).sum(1).tolist()
    if sum(rows) != len(counts):
        raise ValueError(f"counts: got {len(counts)} for {sum(rows)} images in input_ids, expected as many")
    if counts:
        _check.positive(counts=min(counts))
    return torch.tensor([*counts], dtype=torch.int64, device=ids.device).split(rows)


def pad_rows(rows: Sequence[Tensor], value: int, *, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one batch, padded on the right, and the mask of what is theirs: both `[B, T]`.

    `like` gives dtype and device where there are no rows.
    """
    longest = max((len(row) for row in rows), default=0)
    if not rows:
        none = torch.zeros(0, 0, dtype=torch.int64) if like is None else like.new_zeros(0, 0)
        return none, none.bool()
    ids = torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, torch.arange(longest, device=ids.device) < lengths.unsqueeze(1)
