"""Training of the LLaVA family: pictures of many sizes, pages that are read, and how much of the held-out ones is right."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.data import Dataset, Readings, Tokenizer
from mmkernels.data.dialogues import QUESTION
from mmkernels.data.pages import QUESTION as WRITTEN
from mmkernels.data.readings import ReadingBatch, Sight
from mmkernels.data.readings import texts as reading_texts
from mmkernels.data.scenes import SLOTS
from mmkernels.models import Stage
from mmkernels.models.base import IGNORE
from mmkernels.models.llava_text import ask
from mmkernels.train.evaluate import evaluating, right, shuffle
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH = 256, 64  # pictures of each kind that are tried when a stage ends, and at a time


def texts(dataset: Dataset, config: Any) -> list[str]:
    return reading_texts(dataset, [ask(config.template, question) for question in (QUESTION, WRITTEN)])


def readings(
    dataset: Dataset, tokenizer: Tokenizer, config: Any, seed: int, kind: type[Readings] = Readings
) -> Readings:
    """The data of a run, with the pictures' size of its last stage: so they are held out."""
    size = config.stages[-1].image_size or config.vision.image_size
    sight = Sight(config.aspect, size, config.vision.patch_size, config.pinpoints, config.rounding)

    def asked(question: str) -> list[int]:
        return tokenizer.encode(ask(config.template, question))

    return kind(dataset, tokenizer, sight, ask=asked, seed=seed)


class LlavaObjectives(Objectives):
    """`patches`: the tower tells what every patch holds. `echoes`: the language model alone is told so by a code at every
    place, and answers. `pairs`, `instructions`: what it says of pictures, and to questions about them. What reads the patches
    and what makes the codes are thrown away after the stage.
    """

    model: Any
    sequences: Any

    def __init__(self, model: Any, sequences: Readings, batch: int, device: str) -> None:
        super().__init__(model, sequences, batch, device)
        widths = (model.config.vision.width, model.config.lm.block.width)
        self.head = Codes(sequences.nothing + 1, *widths).to(device)
        self._at = cache(sequences.at)

    def names(self) -> tuple[str, ...]:
        return ("patches", "echoes", "pairs", "instructions")

    def parameters(self, stage: Stage) -> list[dict]:
        groups = stage.parameter_groups(self.model)
        if {"patches", "echoes"} & {*stage.losses}:
            groups.append({"params": list(self.head.parameters()), "weight_decay": 0.0})
        return groups

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        """The loss `name` on its batch `number`, of the size that the stage's mix asks for."""
        if name not in self.names():
            known = ", ".join(self.names())
            raise ValueError(f"stage {stage.name!r}: loss {name!r} is unknown, expected one of {known}")
        size = self._size(name, stage.mix)
        drawn = self._at(stage.image_size or self.model.config.vision.image_size)
        if name == "patches":
            pixels, kinds = (t.to(self.device) for t in drawn.shown(number, size))
            told = self.head.read(self.model.vision(pixels))
            held = kinds.where(kinds != drawn.nothing, IGNORE)  # once more without what is easy
            every, rare = (
                F.cross_entropy(told.flatten(0, -2), k.flatten(), ignore_index=IGNORE) for k in (kinds, held)
            )
            return every + rare
        batch: ReadingBatch = getattr(drawn, name)(number, size)
        if name == "echoes":
            return self.run(self.model, batch, media=self.head.code(batch.kinds.to(self.device))).loss
        return self.run(self.model, batch, images=batch.images.to(self.device), plans=batch.plans).loss

    def run(self, model: Any, batch: ReadingBatch, **told: Any) -> Any:
        ids, mask, labels = (t.to(self.device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
        return model(input_ids=ids, attention_mask=mask, labels=labels, **told)

    def options(self, batch: Any) -> dict[str, Any]:
        return {"plans": batch.plans}


class Codes(nn.Module):
    """What a patch holds in its slots, read from the tower's features and written for the language model."""

    def __init__(self, kinds: int, vision: int, text: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.reader = nn.Linear(vision, SLOTS * kinds)
        self.codes = nn.Embedding(SLOTS * kinds, text)
        nn.init.normal_(self.codes.weight, std=0.3)

    def read(self, features: Tensor) -> Tensor:
        """`[N, P, width]` -> logits `[N, P, 2, kinds]`."""
        return self.reader(features).float().unflatten(-1, (SLOTS, self.kinds))

    def code(self, kinds: Tensor) -> Tensor:
        """kinds `[V, 2]` -> `[V, C]`."""
        return self.codes(kinds + self.kinds * torch.arange(SLOTS, device=kinds.device)).sum(1)


@torch.no_grad()
def read(
    model: Any, sequences: Readings, pages: int, size: tuple[int, int] | None = None, **how: bool
) -> dict[str, float]:
    """Shares of held-out pages whose number is read to the last digit: as they are, and with the pictures of others."""
    device, found = next(model.parameters()).device, {"pages read": 0, "pages read, shuffled": 0}
    for number in range(-(-pages // _BATCH)):
        batch = sequences.held_out_pages(number, min(_BATCH, pages - number * _BATCH), size, **how)
        for name, pictures in zip(found, (batch.images, shuffle(batch)), strict=True):
            found[name] += int(hits(model, batch, pictures.to(device)).sum())
    return {name: count / pages for name, count in found.items()}


def hits(model: Any, batch: ReadingBatch, pictures: Tensor) -> Tensor:
    """bool `[B]`: whether greedy decoding gives each row's answer."""
    ids, mask = batch.input_ids.to(pictures.device), batch.attention_mask.to(pictures.device)
    return right(model(pictures, ids, mask, plans=batch.plans).logits.cpu(), batch)


def measure(model: Any, sequences: Readings, stage: Stage) -> dict[str, Any]:
    """After a stage that learns from pictures: `read`."""
    if not {"pairs", "instructions"} & {*stage.losses}:
        return {}
    with evaluating(model):
        return read(model, sequences, HELD_OUT)
