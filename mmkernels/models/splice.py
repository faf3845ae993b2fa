"""From one image token a picture to embeddings, masks and labels, as LLaVA's training code does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.base import IGNORE
from mmkernels.ops.sliced_image import splice_embeddings
from mmkernels.primitives import _check

_NOTHING = -1  # where padding comes from


class Spliced(NamedTuple):
    """embeddings `[B, T, C]`, zeros at padding; attention_mask bool, labels int64 or None, position_ids int64: `[B, T]`."""

    embeddings: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    position_ids: Tensor


def splice(
    input_ids: Tensor,
    media: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor] | Tensor,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    image: int = -200,
    max_length: int | None = None,
    padding_side: str = "right",
    release: str = "llava",
) -> Spliced:
    """Puts each picture's tokens at its `image` in the text, in the order of the batch; everything else is the text's.

    `release="llava"`: padding is dropped first, rows are cut on the right to `max_length` (pictures too), then padded on
    `padding_side`. `release="yi_vl"`: padding stays, nothing is cut, rows are padded on the right, and the mask grows by True
    on its left. Labels of visual tokens and of padding are -100. A row without `image` uses up one picture all the same.

    **Shapes** input_ids, attention_mask bool (None: all is text), labels `[B, T]`; media: `[R_i, C]` a picture; embed: a table
    `[V, C]` or what makes embeddings of ids. **Gradient** media and embed; a picture that is not shown gets zeros, not None.
    **Edge** position_ids count from 0 in every row, 0 at padding.
    **Raises** ValueError for shapes and for another number of pictures than are used up.
    **Source** LLaVA's `prepare_inputs_labels_for_multimodal`. **Speed** one embedding, one `splice_embeddings`.
    """
    _check.shapes(
        input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"), labels=(labels, "B T")
    )
    _check.choice("padding_side", padding_side, ("left", "right"))
    _check.choice("release", release, ("llava", "yi_vl"))
    old = release == "yi_vl"
    if old and (max_length is not None or padding_side == "left"):
        raise ValueError("release: got 'yi_vl' beside max_length or padding_side, expected its own rules")
    shown = _used(input_ids, attention_mask, media, image, old)
    starts = torch.tensor([input_ids.numel(), *map(len, media)]).cumsum(0).tolist()
    sources, valid = [], []
    for b, ids in enumerate(input_ids):
        keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask[b]
        spans = [(starts[n], len(media[n])) for n in shown[b]]
        index, real = _row(ids, keep, b, spans, image, old)
        sources.append(index[:max_length])
        valid.append(real[:max_length])
    index, mask = _padded(sources, _NOTHING, padding_side), _padded(valid, 0, padding_side).bool()
    return _laid(input_ids, media, embed, labels, index, mask)


def _used(
    ids: Tensor, mask: Tensor | None, media: Sequence[Tensor], image: int, old: bool
) -> list[list[int]]:
    """Which pictures every row shows. **Raises** ValueError unless all are used up."""
    found = ids == image
    counts = (found if mask is None or old else found & mask).sum(1).tolist()
    shown, at = [], 0
    for count in counts:
        shown.append([*range(at, at + count)])
        at += max(count, 1)
    if at != len(media):
        raise ValueError(
            f"media: got {len(media)} pictures, expected {at}: one for each {image}, and one for each row without any"
        )
    return shown


def _row(
    ids: Tensor, keep: Tensor, b: int, spans: list[tuple[int, int]], image: int, old: bool
) -> tuple[Tensor, Tensor]:
    """Where the tokens of a row come from, and which of them are its own."""
    place = torch.arange(b * len(ids), (b + 1) * len(ids), device=ids.device)
    kept, place = (ids, place) if old else (ids[keep], place[keep])
    here = iter(spans)
    parts = []
    for token, at in zip(kept.tolist(), place.tolist(), strict=True):
        start, length = next(here) if token == image else (at, 1)
        parts.append(torch.arange(start, start + length, device=ids.device))
    index = torch.cat(parts) if parts else place
    if not old:
        return index, torch.ones_like(index)
    return index, F.pad(keep.long(), (len(index) - len(keep), 0), value=1)


def _padded(rows: list[Tensor], value: int, side: str) -> Tensor:
    longest = max((len(row) for row in rows), default=0)
    ends = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    padded = [F.pad(row, end, value=value) for row, end in zip(rows, ends, strict=True)]
    return torch.stack(padded) if padded else torch.zeros(0, 0, dtype=torch.int64)


def _laid(
    ids: Tensor,
    media: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor] | Tensor,
    labels: Tensor | None,
    index: Tensor,
    mask: Tensor,
) -> Spliced:
    """The rows that `index` describes: below the number of ids a token, behind it a row of a picture, or nothing."""
    count, is_text = ids.numel(), (index >= 0) & (index < ids.numel())
    at = torch.where(is_text, index, 0)
    known = torch.where(is_text, ids.flatten()[at], 0) if count else index
    x = F.embedding(known, embed) if isinstance(embed, Tensor) else embed(known)
    for number, part in enumerate(media):
        _check.shapes(**{f"media[{number}]": (part, f"R {x.shape[-1]}")})
    visual = torch.cat([*media]) if media else x.new_zeros(0, x.shape[-1])
    positions = torch.where(is_text, -1, torch.where(index < 0, -2, index - count))
    x = splice_embeddings(x, visual, positions, special=x.new_zeros(1, x.shape[-1]))
    places = torch.where(mask, mask.long().cumsum(1) - 1, 0)
    if labels is None:
        return Spliced(x, mask, None, places)
    told = torch.where(is_text, labels.flatten()[at], IGNORE) if count else index
    return Spliced(x, mask, told, places)
