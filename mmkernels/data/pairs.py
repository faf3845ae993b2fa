"""Pictures with one caption each, for models whose pictures take several places of the text, and for retrieval."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmkernels.data.dataset import Dataset
from mmkernels.data.sequences import Batch, Sequences
from mmkernels.data.tokenizer import Tokenizer

# what is asked of a picture; one of them, with equal chances
INSTRUCTIONS = ("what is shown?", "describe the picture.", "write a short caption.")
_HELD_OUT, _ASKED, _ECHOES = 10, 11, 12  # streams of random numbers, apart from those of Sequences


class Pairs(Sequences):
    """As `Sequences`, but a document is one picture, which takes `places` places before its caption.

    A text for the Q-Former is `<image>caption<|endofchunk|><|endoftext|>` too: the image token, with no picture to it, is its
    [CLS].
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        size: int,
        *,
        seed: int = 0,
        places: int = 1,
        asks: bool = False,
    ) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.places, self.asks = places, asks
        self._questions = [tokenizer.encode(text) for text in INSTRUCTIONS]

    def captions(self, number: int, batch: int) -> Batch:
        """Pictures in their places, then the caption."""
        return self._placed(self.pairs(number, batch), number)

    def echoes(self, number: int, batch: int) -> Batch:
        """No picture: its places hold the caption's own words, somewhere. What learns to go on obeys its beginning."""
        rng, made = self._rng(_ECHOES, number), self.captions(number, batch)
        for row, caption in enumerate(made.captions.tolist()):
            words = torch.tensor(self._chunks[caption][:-1][: self.places])
            start = int(rng.integers(self.places - len(words) + 1))
            made.input_ids[row, start : start + len(words)] = words
        return made

    def held_out(self, number: int, batch: int) -> Batch:
        """The same of pictures that training never draws."""
        rng = self._rng(_HELD_OUT, number)
        documents = [self._document(rng, 1, held_out=True) for _ in range(batch)]
        return self._placed(self._collate(documents, images=1, length=32), number)

    def texts(self) -> tuple[Tensor, Tensor]:
        """Every caption as a text for the Q-Former: ids and mask `[captions, L]`."""
        rows = [
            [self.tokenizer.image, *chunk, self.tokenizer.end_of_text]
            for chunk in self._chunks
        ]  # fmt: skip
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
        return ids, ids != self.tokenizer.pad

    def question(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What each row asks, for the Q-Former: the text between picture and answer, ids and mask `[B, L]`."""
        lengths = batch.answers[:, 0] - self.places
        ids = batch.input_ids[:, self.places : self.places + int(lengths.max())]
        mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        return torch.where(mask, ids, self.tokenizer.pad), mask

    def _placed(self, batch: Batch, number: int) -> Batch:
        """Widens the picture's one place, and writes a question behind it where the model is asked."""
        rng = self._rng(_ASKED, number)
        rows, answers = [], []
        for ids, mask, answer in zip(
            batch.input_ids, batch.attention_mask, batch.answers.tolist(), strict=True
        ):
            asked = self._questions[int(rng.integers(len(self._questions)))] if self.asks else []
            head = [self.tokenizer.image] * self.places + asked
            rows.append(torch.cat([torch.tensor(head), ids[mask][1:]]))
            answers.append([place + len(head) - 1 for place in answer])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad)
        return replace(
            batch, input_ids=ids, attention_mask=ids != self.tokenizer.pad, answers=torch.tensor(answers)
        )
