"""Photographs and pages of many sizes, each with a question and its answer, as pixels: how they are cut is the model's matter.

Half of the rows are photographs and scans of a dataset, cut to a random size and aspect, half are pages (`data.pages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmkernels.data import pages, scenes
from mmkernels.data.dataset import Dataset
from mmkernels.data.dialogues import QUESTION
from mmkernels.data.looks import Looked
from mmkernels.data.scenes import Cutting, Scenes
from mmkernels.data.sequences import Batch
from mmkernels.data.tokenizer import Tokenizer

_PAIRS, _INSTRUCTIONS, _SHOWN, _OUT, _PAGES_OUT = range(70, 75)  # streams of random numbers


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


class Cuttings(Scenes):
    """Draws batches. `opening(words)` writes a question up to its answer, with the image token; `end` closes answers."""

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
        self.opening, self.end, self.kinds = opening, end, self.nothing + 1

    def pairs(self, number: int, batch: int) -> CutBatch:
        """Pictures and what is said of them, nothing asked."""
        return self._batch(self._rows(self._rng(_PAIRS, number), batch), asks=False)

    def instructions(self, number: int, batch: int) -> CutBatch:
        """Questions about pictures and their answers."""
        return self._batch(self._rows(self._rng(_INSTRUCTIONS, number), batch))

    def held_out(self, number: int, batch: int) -> CutBatch:
        """As `instructions`, of photographs and numbers that training never draws."""
        return self._batch(self._rows(self._rng(_OUT, number), batch, held_out=True))

    def held_out_pages(self, number: int, batch: int, size: tuple[int, int] | None = None) -> CutBatch:
        """Pages alone, of a given size or of many."""
        rng = self._rng(_PAGES_OUT, number)
        return self._batch([self._page(rng, size=size) for _ in range(batch)])

    def shown(self, number: int, batch: int) -> list[Cutting]:
        """Pictures alone."""
        return self._rows(self._rng(_SHOWN, number), batch)

    def patches(self, row: Cutting, seen: Looked, patch: int) -> list[Tensor]:
        """What the patches of a picture's views hold, view by view: `[h, w, 2]`."""
        found = []
        for view, box in zip(seen.views, seen.boxes, strict=True):
            grid = (view.shape[-2] // patch, view.shape[-1] // patch)
            found.append(torch.from_numpy(self.holds(row, grid, partial(_within, box, grid))))
        return found

    def _batch(self, rows: list[Cutting], *, asks: bool = True) -> CutBatch:
        encode, texts, spans = self.tokenizer.encode, [], []
        for row in rows:
            head = self.opening(encode(row.question) if asks else [])
            texts.append([*head, *encode(f" {self.said(row)}"), *self.end])
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


def _within(
    box: tuple[float, float, float, float], grid: tuple[int, int], x: float, y: float
) -> tuple[float, float]:
    """Where a point falls, in patches of the view that shows the box."""
    x0, y0, x1, y1 = box
    return (x - x0) / (x1 - x0) * grid[1], (y - y0) / (y1 - y0) * grid[0]


def texts(dataset: Dataset) -> Iterable[str]:
    """What is said and asked, for a tokenizer."""
    return [*scenes.texts(dataset), QUESTION, pages.QUESTION]
