"""Photographs and pages of many sizes, each with a question and its answer, as pixels: how they are cut is the model's matter.

Half of the rows are photographs and scans of a dataset, cut to a random size and aspect, half are pages (`data.pages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmkernels.data import pages
from mmkernels.data.dataset import Dataset
from mmkernels.data.dialogues import QUESTION
from mmkernels.data.looks import Looked
from mmkernels.data.pages import Page
from mmkernels.data.sequences import Batch, Sequences
from mmkernels.data.tokenizer import Tokenizer

_PAIRS, _INSTRUCTIONS, _SHOWN, _OUT, _PAGES_OUT = range(70, 75)  # streams of random numbers
SLOTS = 2  # of a patch: a digit in its left half, and one in its right half


@dataclass(frozen=True)
class Cutting:
    """A picture uint8 `[H, W, 3]` of any size, the number of its caption, and the page it is, if it is one."""

    pixels: NDArray[np.uint8]
    caption: int
    page: Page | None


@dataclass(frozen=True)
class CutBatch(Batch):
    """One picture a row, told by the one image token of its text. images `[B, 1, 1]` are numbers of `pictures`, from 1.

    labels `[B, T]` are -100 but at the answer and the end behind it.
    """

    pictures: tuple[Cutting, ...]
    labels: Tensor

    def shown(self, images: Tensor) -> list[Cutting]:
        """The pictures that `images` names, row by row."""
        return [self.pictures[n - 1] for n in images.flatten().tolist()]


class Cuttings(Sequences):
    """Draws batches. `opening(words)` writes a question up to its answer, with the image token; `end` closes answers.

    Kinds of what a patch holds, in either slot: the number of a caption, all over a photograph; behind those the ten digits, at
    the patch where a digit's centre is; last, nothing.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        size: int,
        *,
        opening: Callable[[list[int]], list[int]],
        end: tuple[int, ...],
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.opening, self.end, self._photographs = opening, end, dataset
        self.kinds = len(dataset.captions) + 11
        self.dataset = replace(  # captions are counted with the pages
            dataset,
            captions=(*dataset.captions, "a page"),
            train=(*dataset.train, ()),
            held_out=(*dataset.held_out, ()),
        )

    def pairs(self, number: int, batch: int) -> CutBatch:
        """Pictures and what is said of them, nothing asked."""
        return self._batch(self._rows(_PAIRS, number, batch), asks=False)

    def instructions(self, number: int, batch: int) -> CutBatch:
        """Questions about pictures and their answers."""
        return self._batch(self._rows(_INSTRUCTIONS, number, batch))

    def held_out(self, number: int, batch: int) -> CutBatch:
        """As `instructions`, of photographs and numbers that training never draws."""
        return self._batch(self._rows(_OUT, number, batch, held_out=True))

    def held_out_pages(self, number: int, batch: int, size: tuple[int, int] | None = None) -> CutBatch:
        """Pages alone, of a given size or of many."""
        rng = self._rng(_PAGES_OUT, number)
        return self._batch([self._page(rng, held_out=True, size=size) for _ in range(batch)])

    def shown(self, number: int, batch: int) -> list[Cutting]:
        """Pictures alone."""
        return self._rows(_SHOWN, number, batch)

    def holds(self, row: Cutting, seen: Looked, patch: int) -> list[Tensor]:
        """What the patches of a picture's views hold, view by view: `[h, w, 2]`."""
        nothing, found = self.kinds - 1, []
        for view, (x0, y0, x1, y1) in zip(seen.views, seen.boxes, strict=True):
            h, w = view.shape[-2] // patch, view.shape[-1] // patch
            kinds = torch.full((h, w, SLOTS), nothing if row.page else row.caption)
            for digit, (x, y) in zip(row.page.digits, row.page.centres, strict=True) if row.page else ():
                at, line = int((x - x0) / (x1 - x0) * w * SLOTS // 1), int((y - y0) / (y1 - y0) * h // 1)
                if x >= x0 and y >= y0 and at < w * SLOTS and line < h:
                    kinds[line, at // SLOTS, at % SLOTS] = len(self._photographs.captions) + digit
            found.append(kinds)
        return found

    def _rows(self, stream: int, number: int, batch: int, *, held_out: bool = False) -> list[Cutting]:
        rng = self._rng(stream, number)
        draw = (self._photograph, self._page)
        return [draw[n % 2](rng, held_out=held_out) for n in range(batch)]

    def _page(
        self, rng: np.random.Generator, *, held_out: bool, size: tuple[int, int] | None = None
    ) -> Cutting:
        page = pages.page(
            rng, size=size
        )  # held-out pages are of another stream: none is drawn twice but by chance
        return Cutting(page.pixels, len(self._photographs.captions), page)

    def _photograph(self, rng: np.random.Generator, *, held_out: bool) -> Cutting:
        width, height = pages.sizes(rng)
        side = max(width, height)
        pixels, caption = self._photographs.draw(rng, side, held_out=held_out)
        left, top = (side - width) // 2, (side - height) // 2
        return Cutting(pixels[top : top + height, left : left + width], caption, None)

    def _batch(self, rows: list[Cutting], *, asks: bool = True) -> CutBatch:
        encode, texts, spans = self.tokenizer.encode, [], []
        for row in rows:
            asked = pages.QUESTION if row.page else QUESTION
            said = row.page.text if row.page else self._photographs.captions[row.caption]
            head = self.opening(encode(asked) if asks else [])
            texts.append([*head, *encode(f" {said}"), *self.end])
            spans.append((len(head), len(texts[-1]) - len(self.end) + 1))
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(text) for text in texts], batch_first=True, padding_value=self.tokenizer.pad
        )
        lengths, answers = torch.tensor([len(text) for text in texts]), torch.tensor(spans)
        place = torch.arange(ids.shape[1])
        said = (place >= answers[:, :1]) & (place < answers[:, 1:])
        return CutBatch(
            torch.arange(1, len(rows) + 1).view(-1, 1, 1), ids, place < lengths[:, None], answers,
            torch.tensor([row.caption for row in rows]), tuple(rows), torch.where(said, ids, -100),
        )  # fmt: skip


def texts(dataset: Dataset) -> Iterable[str]:
    """What is said and asked, for a tokenizer."""
    digits = [f" {pages.written((n, n))}" for n in range(10)]
    return [
        *dataset.captions,
        *(f" {caption}" for caption in dataset.captions),
        *digits,
        QUESTION,
        pages.QUESTION,
    ]
