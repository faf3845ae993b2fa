"""Qwen-VL's text side: where images stand in it, what is predicted, and how boxes are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.base import IGNORE, Tokens
from mmkernels.primitives import _check

_BOX = re.compile(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
_PLACES = 1000


@dataclass(frozen=True)
class Marks:
    """Token ids beside those of `Tokens`: an image is `Tokens.image`, slots, `image_end`; a turn of ChatML begins with `turn`,
    a role and a newline, and ends with `Tokens.end_of_chunk` and a newline.
    """

    image_end: int
    slot: int
    turn: int
    newline: int
    assistant: int

    def image(self, tokens: Tokens, slots: int) -> list[int]:
        """What stands for an image in the text."""
        _check.positive(slots=slots)
        return [tokens.image, *[self.slot] * slots, self.image_end]


def image_places(input_ids: Tensor, image: int) -> tuple[Tensor, Tensor]:
    """For every token the image that was opened last (from 0, -1 before any) and its place after the opening (from 0)."""
    opens = input_ids == image
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    opened = torch.where(opens, position, -1).cummax(1).values
    place = torch.where(opened < 0, -1, position - opened - 1)
    return opens.long().cumsum(1) - 1, place


def check_slots(input_ids: Tensor, tokens: Tokens, marks: Marks, slots: int, images: int) -> None:
    """Reads values: every image token is followed by its slots and its end, and no row has more of them than `images`."""
    b, t = input_ids.shape
    rows, at = (input_ids == tokens.image).nonzero(as_tuple=True)
    ends = torch.cat([input_ids, input_ids.new_full((b, 1), tokens.pad)], 1)[
        rows, (at + slots + 1).clamp(max=t)
    ]
    wrong = (ends != marks.image_end).nonzero()
    if len(wrong):
        row, place = int(rows[wrong[0]]), int(at[wrong[0]])
        raise ValueError(
            f"input_ids: row {row} opens an image at {place}, expected {slots} slots and token {marks.image_end} after it"
        )
    most = int(torch.bincount(rows, minlength=1).max())
    if most > images:
        raise ValueError(
            f"images: got {images} a row, expected as many as image tokens, of which a row has {most}"
        )


def text_labels(
    input_ids: Tensor, tokens: Tokens, marks: Marks, slots: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Labels `[B, T]` of the first two stages: all text; -100 on padding and from each image token to its image end."""
    _check.shapes(input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"))
    place = image_places(input_ids, tokens.image)[1]
    image = (input_ids == tokens.image) | ((place >= 0) & (place <= slots))
    keep = input_ids != tokens.pad if attention_mask is None else attention_mask
    return torch.where(keep & ~image, input_ids, IGNORE)


def chatml_labels(
    input_ids: Tensor, tokens: Tokens, marks: Marks, attention_mask: Tensor | None = None
) -> Tensor:
    """Labels `[B, T]` of the last stage: of every turn its start, its end and the newline after that; of the assistant's
    turns also what is said, without the role and the newline behind it. **Source** Qwen-VL's recipe.
    """
    _check.shapes(input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"))
    starts, ends = input_ids == marks.turn, input_ids == tokens.end_of_chunk
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
    opened = torch.where(starts, position, 0).cummax(1).values
    closed = F.pad(torch.where(ends, position, 0).cummax(1).values[:, :-1], (1, 0))
    role = F.pad(input_ids, (0, 1)).gather(1, opened)  # the token after the start
    said = (opened > closed) & (role == marks.assistant) & (position - opened >= 3)
    after = F.pad(ends[:, :-1], (1, 0)) & (input_ids == marks.newline)
    keep = starts | ends | after | said
    keep = keep & (input_ids != tokens.pad if attention_mask is None else attention_mask)
    return torch.where(keep, input_ids, IGNORE)


def chatml_ids(
    turns: Sequence[tuple[str, str | list[int]]],
    encode: Callable[[str], list[int]],
    tokens: Tokens,
    marks: Marks,
) -> list[int]:
    """Turns (role, text or its ids) as one conversation: `<turn>role`, a newline, the text, its end and a newline for each."""
    ids: list[int] = []
    for role, text in turns:
        name = [marks.assistant] if role == "assistant" else encode(role)
        said = encode(text) if isinstance(text, str) else text
        ids += [marks.turn, *name, marks.newline, *said, tokens.end_of_chunk, marks.newline]
    return ids


def chat_prompt(
    text: str, pictures: int, encode: Callable[[str], list[int]], tokens: Tokens, marks: Marks
) -> list[int]:
    """What is asked about pictures, up to where the assistant's answer begins: a user's turn in which each picture has its line
    (`picture_text`, one image token for a picture) before the text, and the opening of the assistant's turn.

    A text that says itself where its pictures stand has 0 of them.
    """
    lines = [
        t for k in range(1, pictures + 1) for t in (*encode(f"Picture {k}: "), tokens.image, marks.newline)
    ]
    asked = chatml_ids([("user", [*lines, *encode(text)])], encode, tokens, marks)
    return [*asked, marks.turn, marks.assistant, marks.newline]


def picture_text(number: int, path: str) -> str:
    """How one of several pictures is introduced, counting from 1: `Picture k: <img>path</img>` and a newline."""
    _check.positive(number=number)
    return f"Picture {number}: <img>{path}</img>\n"


def box_text(box: Sequence[float], size: tuple[int, int]) -> str:
    """A box in pixels (x1, y1, x2, y2) of a picture of `size` (width, height) as `<box>(x1,y1),(x2,y2)</box>`.

    Corners become thousandths of the picture, rounded down, 0 to 999. **Raises** ValueError for boxes that leave the picture.
    """
    (width, height), (x1, y1, x2, y2) = size, box
    _check.positive(width=width, height=height)
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        raise ValueError(f"box: got {tuple(box)}, expected x1 <= x2 and y1 <= y2 inside {width} x {height}")
    corners = (int(_PLACES * c / full) for c, full in ((x1, width), (y1, height), (x2, width), (y2, height)))
    return "<box>({},{}),({},{})</box>".format(*(min(c, _PLACES - 1) for c in corners))


def ref_text(text: str, boxes: Sequence[str] = ()) -> str:
    """What a text refers to, and where it is: `<ref>text</ref>` and its boxes, each as `box_text` writes it."""
    return f"<ref>{text}</ref>{''.join(boxes)}"


def boxes_in(text: str, size: tuple[int, int] = (_PLACES, _PLACES)) -> list[tuple[float, ...]]:
    """The boxes (x1, y1, x2, y2) that a text writes, in thousandths, or in pixels of a picture of `size`.

    Numbers of 1000 and more are no box.
    """
    found = ([int(n) for n in numbers] for numbers in _BOX.findall(text))
    sides = (*size, *size)
    return [
        tuple(c * side / _PLACES for c, side in zip(box, sides, strict=True))
        for box in found
        if max(box) < _PLACES
    ]
