"""Documents whose pictures take several tokens each, and conversations about one picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mmkernels.data.dataset import Dataset
from mmkernels.data.sequences import MAX_IMAGES, Batch, Sequences, _Document
from mmkernels.data.tokenizer import Tokenizer

QUESTION = "what is this?"
Talk = Callable[[list[int]], tuple[list[int], int]]
_INSTRUCTIONS, _HELD_OUT, _ECHOES = 16, 17, 18  # streams of random numbers, beside those of `Sequences`


class Dialogues(Sequences):
    """`Sequences` in which the tokens `after` follow every image token, with conversations beside them.

    `talk(answer)` writes a conversation about one picture: its ids, with the image token, and where in them the answer begins.
    Conversations are what is held out.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        size: int,
        *,
        seed: int,
        after: tuple[int, ...],
        talk: Talk,
    ) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.after, self.talk = after, talk

    def at(self, size: int) -> Dialogues:
        """The same with pictures of another size."""
        return Dialogues(self.dataset, self.tokenizer, size, seed=self.seed, after=self.after, talk=self.talk)

    def instructions(self, number: int, batch: int) -> Batch:
        """One conversation about one picture a row; its answer is the caption, with the end of its chunk."""
        return self._conversations(self._rng(_INSTRUCTIONS, number), batch, held_out=False)

    def echoes(self, number: int, batch: int) -> Batch:
        """Captions behind as many places as a picture takes, which hold the caption's own words, somewhere, and no picture.

        What learns to go on from there obeys what it is shown.
        """
        rng, rows, places = self._rng(_ECHOES, number), [], 1 + len(self.after)
        captions = torch.from_numpy(rng.integers(len(self._chunks), size=batch))
        for caption in captions.tolist():
            chunk, before = self._chunks[caption], [self.after[0]] * places
            words = chunk[:-1][:places]
            start = int(rng.integers(places - len(words) + 1))
            before[start : start + len(words)] = words
            rows.append(torch.tensor([*before, *chunk, self.tokenizer.end_of_text]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad)
        answers = torch.tensor([[places, places + len(self._chunks[c])] for c in captions.tolist()])
        return Batch(
            torch.zeros(batch, 0, 3, self.size, self.size), ids, ids != self.tokenizer.pad, answers, captions
        )

    def held_out(self, number: int, batch: int) -> Batch:
        """Conversations about pictures that training never draws."""
        return self._conversations(self._rng(_HELD_OUT, number), batch, held_out=True)

    def _conversations(self, rng: np.random.Generator, batch: int, *, held_out: bool) -> Batch:
        documents = []
        for _ in range(batch):
            pixels, caption = self.dataset.draw(rng, self.size, held_out=held_out)
            answer = self._chunks[caption]
            ids, start = self.talk(answer)
            documents.append(_Document([pixels], ids, (start, start + len(answer)), caption))
        return self._collate(documents, images=1)

    def _collate(self, documents: list[_Document], images: int = MAX_IMAGES, length: int = 256) -> Batch:
        longer = [self._with_places(document) for document in documents]
        return super()._collate(longer, images, length + images * len(self.after))

    def _with_places(self, document: _Document) -> _Document:
        image, more = self.tokenizer.image, len(self.after)
        start, end = (at + more * document.ids[:at].count(image) for at in document.answer)
        ids = [i for token in document.ids for i in ((token, *self.after) if token == image else (token,))]
        return _Document(document.views, ids, (start, end), document.caption)
