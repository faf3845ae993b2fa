"""Training of LaVIN: answers about pictures and about words alone, and how much of the held-out ones is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.data import Batch, Dataset, Mixtures, Tokenizer
from mmkernels.data.mixtures import answer_labels
from mmkernels.models import LavinConfig, Stage
from mmkernels.models.lavin_text import NOTHING
from mmkernels.train.evaluate import evaluating, right, shuffle
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH = 256, 64  # questions of each kind that are tried when a stage ends, and at a time


def mixtures(dataset: Dataset, tokenizer: Tokenizer, config: LavinConfig, seed: int) -> Mixtures:
    """The data of a run. **Raises** ValueError when the captions' tokens reach those that the model opens its rows with."""
    marks, places = config.marks, [config.tokens.image] * config.places
    lowest = min(marks.modality, *marks.image_prefix, *marks.text_prefix)
    if len(tokenizer) > lowest:
        raise ValueError(f"data: its captions have {len(tokenizer)} tokens, expected at most {lowest}")
    start = [marks.modality, marks.bos]
    openings = ([*start, *marks.text_prefix], [*start, *marks.image_prefix, *places])
    return Mixtures(dataset, tokenizer, config.vision.image_size, seed=seed, openings=openings)


class LavinObjectives(Objectives):
    """`pictures`: the mean class token tells the caption's number, as for other towers. The others predict answers, which are
    captions: `echoes` behind their own words in the places of a picture, `text` to questions about two captions, `mixture` to
    questions with a picture and without one.
    """

    model: Any
    sequences: Any

    def names(self) -> tuple[str, ...]:
        return ("pictures", "echoes", "text", "mixture")

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        if name == "pictures" or name not in self.names():
            return super().loss(name, number, stage)
        draw = {
            "echoes": self.sequences.echoes,
            "text": self.sequences.texts,
            "mixture": self.sequences.mixture,
        }
        batch: Batch = draw[name](number, self._size(name, stage.mix))
        labels = answer_labels(batch, NOTHING).to(self.device)
        return self.model(**_told(self.model, batch, batch.images, self.device), labels=labels).loss


def _told(model: Any, batch: Batch, images: Tensor, device: Any) -> dict[str, Tensor | None]:
    """What the model is given: words, and pictures if any row has places for one."""
    ids, mask = batch.input_ids, batch.attention_mask
    echo = images.shape[1] == 0 or not bool((ids == model.tokens.image).any())
    return {
        "images": None if echo else images.to(device),
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
    }


@torch.no_grad()
def answers(model: Any, sequences: Mixtures, questions: int) -> dict[str, float]:
    """Shares of held-out questions answered right: with a picture, with another one, and without."""
    device = next(model.parameters()).device
    hits = dict.fromkeys(("with a picture", "with another picture", "without a picture"), 0)
    for number in range(-(-questions // _BATCH)):
        size = min(_BATCH, questions - number * _BATCH)
        seen, told = sequences.held_out(number, size), sequences.texts(number, size, held_out=True)
        for name, batch, images in zip(
            hits, (seen, seen, told), (seen.images, shuffle(seen), told.images), strict=True
        ):
            logits = model(**_told(model, batch, images, device)).logits
            hits[name] += int(right(logits.cpu(), batch).sum())
    return {name: count / questions for name, count in hits.items()}


def measure(model: Any, sequences: Mixtures, stage: Stage) -> dict[str, Any]:
    """After each stage: `answers`."""
    with evaluating(model):
        return answers(model, sequences, HELD_OUT)
