"""Held-out accuracy: is the last caption of an unseen document right, and is it the picture that tells it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.data import Batch, Sequences

_BATCH = 64


@dataclass
class Score:
    """Documents whose whole last caption was right, of all, and per caption."""

    right: int = 0
    total: int = 0
    captions: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.total)

    def add(self, caption: str, hit: bool) -> None:
        right, total = self.captions.get(caption, (0, 0))
        self.captions[caption] = (right + hit, total + 1)
        self.right, self.total = self.right + hit, self.total + 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards as it was."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@torch.no_grad()
def last_image(
    model: Any,
    sequences: Sequences,
    documents: int,
    *,
    shuffled: bool = False,
    hits: Callable[[Any, Batch, Tensor], Tensor] | None = None,
) -> Score:
    """Scores the caption of the last picture on held-out documents.

    A caption is right when at each of its positions, end of chunk included, the likeliest token is the true one: exactly
    then greedy decoding would write it. `shuffled` gives every picture's place to a picture of another document: what is
    then still right is chance, or it was the text that told it. `hits(model, batch, pictures)` tells
    which rows are right; the model of pictures, ids and mask unless given.
    """
    score, device = Score(), next(model.parameters()).device
    for number in range(-(-documents // _BATCH)):
        batch = sequences.held_out(number, min(_BATCH, documents - number * _BATCH))
        pictures = shuffle(batch) if shuffled else batch.images
        found = (hits or _hits)(model, batch, pictures.to(device))
        for caption, hit in zip(batch.captions.tolist(), found.tolist(), strict=True):
            score.add(sequences.dataset.captions[caption], hit)
    return score


def _hits(model: Any, batch: Batch, pictures: Tensor) -> Tensor:
    ids, mask = batch.input_ids.to(pictures.device), batch.attention_mask.to(pictures.device)
    return right(model(pictures, ids, mask).logits.cpu(), batch)


def right(logits: Tensor, batch: Batch) -> Tensor:
    """bool `[B]`: whether greedy decoding of logits `[B, T, V]` gives each row's last caption."""
    hits = logits.argmax(-1).roll(1, 1) == batch.input_ids
    position = torch.arange(batch.input_ids.shape[1])
    inside = (position >= batch.answers[:, :1]) & (position < batch.answers[:, 1:])
    return (hits | ~inside).all(1)


def shuffle(batch: Batch) -> Tensor:
    """The batch's pictures, each in the place of one half a batch away; places without a picture stay empty."""
    places = batch.images.flatten(2).any(-1)
    pool = batch.images[places]
    images = batch.images.clone()
    images[places] = pool.roll(len(pool) // 2, 0)
    return images
