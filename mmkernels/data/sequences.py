"""Interleaved sequences of pictures and captions, and the two batches of a training step.

A document is a run of chunks, `<image>caption<|endofchunk|>` each, closed by `<|endoftext|>`. In a quarter of the
documents only the last picture is captioned: then the pictures stand side by side and only the last one tells the caption.
Batches are numbered: batch `number` of a seed is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmkernels.data import images
from mmkernels.data.dataset import Dataset
from mmkernels.data.tokenizer import Tokenizer

MAX_IMAGES = 6
_PAIRS, _INTERLEAVED, _HELD_OUT, _PICTURES = range(4)  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    """images `[B, I, 3, S, S]` (zeros after a document's own), input_ids and attention_mask `[B, T]`.

    The last caption of row b, with its end of chunk, is at positions `answers[b, 0]` to `answers[b, 1] - 1`; its number is
    `captions[b]`.
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor
    captions: Tensor


@dataclass(frozen=True)
class _Document:
    views: list[NDArray[np.uint8]]
    ids: list[int]
    answer: tuple[int, int]
    caption: int


class Sequences:
    """Draws batches from a dataset: pictures are cut to `size`, the text is cut to the published lengths."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, size: int, *, seed: int = 0) -> None:
        self.dataset, self.tokenizer, self.size, self.seed = dataset, tokenizer, size, seed
        self._chunks = [[*tokenizer.encode(caption), tokenizer.end_of_chunk] for caption in dataset.captions]

    def pairs(self, number: int, batch: int) -> Batch:
        """One picture and its caption a row, at most 32 tokens."""
        rng = self._rng(_PAIRS, number)
        return self._collate([self._document(rng, 1) for _ in range(batch)], images=1, length=32)

    def interleaved(self, number: int, batch: int) -> Batch:
        """One to six pictures a row, at most 256 tokens; a document of one picture is kept with probability 1/2."""
        rng = self._rng(_INTERLEAVED, number)
        return self._collate([self._document(rng, _count(rng)) for _ in range(batch)])

    def held_out(self, number: int, batch: int) -> Batch:
        """Two to six pictures a row that training never draws."""
        rng = self._rng(_HELD_OUT, number)
        counts = rng.integers(2, MAX_IMAGES + 1, size=batch)
        return self._collate([self._document(rng, int(n), held_out=True) for n in counts])

    def pictures(self, number: int, batch: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Pictures alone `[B, 3, S, S]` and the numbers of their captions `[B]`."""
        rng = self._rng(_PICTURES, number)
        drawn = [self.dataset.draw(rng, self.size, held_out=held_out) for _ in range(batch)]
        return images.normalise(np.stack([v for v, _ in drawn])), torch.tensor([c for _, c in drawn])

    def _rng(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream, number))

    def _document(self, rng: np.random.Generator, count: int, *, held_out: bool = False) -> _Document:
        only_last = rng.random() < 0.25
        views, ids, start = [], [], 0
        for i in range(count):
            pixels, caption = self.dataset.draw(rng, self.size, held_out=held_out)
            views.append(pixels)
            ids.append(self.tokenizer.image)
            start = len(ids)
            if i == count - 1 or not only_last:
                ids.extend(self._chunks[caption])
        return _Document(views, [*ids, self.tokenizer.end_of_text], (start, len(ids)), caption)

    def _collate(self, documents: list[_Document], images: int = MAX_IMAGES, length: int = 256) -> Batch:
        longest = min(length, max(len(d.ids) for d in documents))
        ids = torch.full((len(documents), longest), self.tokenizer.pad)
        pixels = torch.zeros(len(documents), images, 3, self.size, self.size)
        for row, document in enumerate(documents):
            text = torch.tensor(document.ids[:longest])
            ids[row, : len(text)] = text
            if document.views:
                pixels[row, : len(document.views)] = _normalised(document.views)
        answers = torch.tensor([d.answer for d in documents]).clamp(max=longest)
        return Batch(
            pixels, ids, ids != self.tokenizer.pad, answers, torch.tensor([d.caption for d in documents])
        )


def _normalised(views: list[NDArray[np.uint8]]) -> Tensor:
    return images.normalise(np.stack(views))


def _count(rng: np.random.Generator) -> int:
    """Pictures of an interleaved document."""
    while True:
        count = int(rng.integers(1, MAX_IMAGES + 1))
        if count > 1 or rng.random() < 0.5:
            return count
