"""LaVIN's text side: where the modality and the picture stand in a row, and what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmkernels.models.base import Tokens
from mmkernels.primitives import _check

NOTHING = 0  # the label of what is not predicted, as published; -100 is understood too


@dataclass(frozen=True)
class Marks:
    """What LaVIN writes before a text: the modality's place, the text's beginning `bos`, and one of two prefixes.

    `image_prefix` ("Image: ") stands before the picture's places, `text_prefix` ("Image: N/A") says that there is none.
    """

    modality: int
    bos: int
    image_prefix: tuple[int, ...]
    text_prefix: tuple[int, ...]


class Rows(NamedTuple):
    """ids int64, mask bool and labels int64 or None, each `[B, T]`, padded on the right."""

    ids: Tensor
    mask: Tensor
    labels: Tensor | None


def insert_images(
    x: Tensor,
    labels: Tensor | None,
    images: Tensor,
    image_prefix: Tensor,
    text_prefix: Tensor,
    has_image: Tensor,
    *,
    modality: Tensor | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Puts the picture, or the words that there is none, after a row's first token; cuts rows to `length`.

    Row b becomes `[modality[b]] x[b, 0], image_prefix, images[b], x[b, 1:]` with an image, else
    `[modality[b]] x[b, 0], text_prefix, x[b, 1:]`; `length` is T, x's own, by default, as published. Rows that end before are
    filled with 0. Labels of what is put in are 0.

    **Shapes** x `[B, T, ...]`, images `[B, R, ...]`, image_prefix `[P, ...]`, text_prefix `[N, ...]`, modality `[B, ...]`: all
    ids, or all embeddings; labels `[B, T]`; has_image `[B]`, true above 0. Returns x and labels of `length`.
    **Gradient** all but labels and has_image. **Edge** the host reads nothing. **Raises** ValueError for shapes.
    **Source** LaVIN (arXiv 2305.15023).
    """
    rest = " ".join(f"C{n}" for n in range(x.dim() - 2))
    size = _check.shapes(
        x=(x, f"B T {rest}"), labels=(labels, "B T"), images=(images, f"B R {rest}"), image_prefix=(image_prefix, f"P {rest}"),
        text_prefix=(text_prefix, f"N {rest}"), has_image=(has_image, "B"), modality=(modality, f"B {rest}"),
    )  # fmt: skip
    b, length = size["B"], size["T"] if length is None else length
    has = (has_image > 0).unsqueeze(1)

    def rows(x: Tensor, front: Tensor, *middle: Tensor) -> Tensor:
        parts = (front, x[:, :1], *(m.to(x.dtype) for m in middle), x[:, 1:])
        joined = torch.cat(parts, dim=1)[:, :length]
        return F.pad(joined, (0, 0) * (x.dim() - 2) + (0, length - joined.shape[1]))

    front = x[:, :0] if modality is None else modality.unsqueeze(1).to(x.dtype)
    some, none = (p.unsqueeze(0).expand(b, *p.shape) for p in (image_prefix, text_prefix))
    chosen = has.view(b, 1, *(1,) * (x.dim() - 2))
    out = torch.where(chosen, rows(x, front, some, images), rows(x, front, none))
    if labels is None:
        return out, None
    nothing = [labels.new_full(t.shape[:2], NOTHING) for t in (front, some, images, none)]
    return out, torch.where(has, rows(labels, *nothing[:3]), rows(labels, nothing[0], nothing[3]))


def lay_out(
    input_ids: Tensor,
    tokens: Tokens,
    marks: Marks,
    places: int,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Rows:
    """Texts, an image token anywhere in those that have a picture -> whole rows; nothing is cut off.

    **Shapes** input_ids, labels, attention_mask (True at text; None: all is) `[B, T]`. **Edge** the beginning `marks.bos` is
    added where a text has none. Values are read: for the host. **Raises** ValueError for shapes and for a second picture.
    """
    _check.shapes(
        input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"), labels=(labels, "B T")
    )
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    images = ((input_ids == tokens.image) & mask).sum(1)
    if bool((images > 1).any()):
        row = int((images > 1).nonzero()[0])
        raise ValueError(f"input_ids: row {row} has {int(images[row])} image tokens, expected one at most")
    texts, answers = [], []
    for b, ids in enumerate(input_ids):
        keep = mask[b] & (ids != tokens.image)
        bare = bool(keep.sum() == 0) or int(ids[keep][0]) != marks.bos
        texts.append(F.pad(ids[keep], (int(bare), 0), value=marks.bos))
        if labels is not None:
            answers.append(F.pad(labels[b][keep], (int(bare), 0), value=NOTHING))
    if not texts:
        return Rows(input_ids, mask, labels)
    ids = pad_sequence(texts, batch_first=True, padding_value=tokens.pad)
    targets = None if labels is None else pad_sequence(answers, batch_first=True, padding_value=NOTHING)
    like = {"dtype": ids.dtype, "device": ids.device}
    some, none = (torch.tensor(p, **like) for p in (marks.image_prefix, marks.text_prefix))
    more = 1 + torch.where(images > 0, len(some) + places, len(none))
    lengths = torch.tensor([len(text) for text in texts], device=ids.device) + more
    width = int(lengths.max())
    picture, place = ids.new_full((len(ids), places), tokens.image), ids.new_full((len(ids),), marks.modality)
    laid, targets = insert_images(ids, targets, picture, some, none, images, modality=place, length=width)
    valid = torch.arange(width, device=ids.device) < lengths.unsqueeze(1)
    return Rows(torch.where(valid, laid, tokens.pad), valid, targets)
