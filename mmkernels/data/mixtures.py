"""Questions about a picture and questions about words alone, in the same batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mmkernels.data.dataset import Dataset
from mmkernels.data.pairs import INSTRUCTIONS
from mmkernels.data.sequences import Batch, Sequences, _Document
from mmkernels.data.tokenizer import Tokenizer

QUESTIONS = ("what is first?", "what is last?")  # of two captions
_MIXTURE, _TEXTS, _ECHOES, _PICTURES_OUT, _TEXTS_OUT = range(20, 25)  # streams of random numbers
_HELD_OUT = 5  # every fifth pair of captions, whatever its question


class Mixtures(Sequences):
    """As `Sequences`, but a document is a question and its answer, which is a caption with its end of chunk.

    `openings` are what is written before: `openings[1]` where there is a picture, with as many image tokens as it takes,
    `openings[0]` where there is none. Without a picture the question is about two captions in the text.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        size: int,
        *,
        seed: int = 0,
        openings: tuple[list[int], list[int]],
    ) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.openings = openings
        self._asked = [tokenizer.encode(text) if text else [] for text in ("", *INSTRUCTIONS)]

    def mixture(self, number: int, batch: int) -> Batch:
        """Every second row, from the first on, has a picture."""
        rng = self._rng(_MIXTURE, number)
        return self._collate([self._either(rng, i % 2 == 0, held_out=False) for i in range(batch)], images=1)

    def texts(self, number: int, batch: int, *, held_out: bool = False) -> Batch:
        """No row has a picture; held out are pairs of captions that training never asks about."""
        rng = self._rng(_TEXTS_OUT if held_out else _TEXTS, number)
        return self._collate([self._either(rng, False, held_out=held_out) for _ in range(batch)], images=1)

    def held_out(self, number: int, batch: int) -> Batch:
        """Questions about pictures that training never draws."""
        rng = self._rng(_PICTURES_OUT, number)
        return self._collate([self._either(rng, True, held_out=True) for _ in range(batch)], images=1)

    def echoes(self, number: int, batch: int) -> Batch:
        """No picture: its places hold the caption's own words, somewhere. What learns to go on obeys what it is shown."""
        rng, image = self._rng(_ECHOES, number), self.tokenizer.image
        places, documents = self.openings[1].count(image), []
        blank = self.openings[1][self.openings[1].index(image) - 1]
        for _ in range(batch):
            caption = int(rng.integers(len(self._chunks)))
            words = self._chunks[caption][:-1][:places]
            start = int(rng.integers(places - len(words) + 1))
            shown = iter([blank] * start + words + [blank] * (places - len(words) - start))
            opening = [next(shown) if token == image else token for token in self.openings[1]]
            documents.append(self._answered(opening + self._question(rng), caption))
        return self._collate(documents, images=0)

    def _either(self, rng: np.random.Generator, picture: bool, *, held_out: bool) -> _Document:
        if picture:
            pixels, caption = self.dataset.draw(rng, self.size, held_out=held_out)
            return self._answered(self.openings[1] + self._question(rng), caption, pixels)
        pair = next(pair for pair in self._pairs(rng) if (sum(pair) % _HELD_OUT == 0) == held_out)
        last = int(rng.integers(2))
        told = ". ".join((*(self.dataset.captions[caption] for caption in pair), QUESTIONS[last]))
        return self._answered(self.openings[0] + self.tokenizer.encode(told), pair[last])

    def _pairs(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Two different captions, with equal chances."""
        while True:
            first, last = (int(c) for c in rng.choice(len(self._chunks), 2, replace=False))
            yield first, last

    def _question(self, rng: np.random.Generator) -> list[int]:
        return self._asked[int(rng.integers(len(self._asked)))]

    def _answered(self, asked: list[int], caption: int, *views: np.ndarray) -> _Document:
        ids = [*asked, *self._chunks[caption]]
        return _Document(list(views), [*ids, self.tokenizer.end_of_text], (len(asked), len(ids)), caption)


def answer_labels(batch: Batch, nothing: int) -> torch.Tensor:
    """Labels `[B, T]`: the answer and the end of text behind it, `nothing` elsewhere."""
    place = torch.arange(batch.input_ids.shape[1])
    said = (place >= batch.answers[:, :1]) & batch.attention_mask
    return torch.where(said, batch.input_ids, nothing)
