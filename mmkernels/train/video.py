"""Training of LLaMA-VID: answers about videos; how much of a held-out answer the frames, and their order, tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.data import VideoBatch
from mmkernels.models import Stage
from mmkernels.train.evaluate import evaluating, right
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH = 256, 64  # videos that are tried when the last stage ends, and at a time


class VideoObjectives(Objectives):
    """`videos`: the language model's loss on answers behind video and question. `text`: on question and answer alone."""

    model: Any
    sequences: Any

    def names(self) -> tuple[str, ...]:
        return ("pictures", "text", "videos")

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        if name not in ("text", "videos"):
            return super().loss(name, number, stage)
        batch = self.sequences.videos(number, self._size(name, stage.mix))
        ids, mask, labels = (t.to(self.device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
        if name == "videos":
            return self.model(batch.images.to(self.device), ids, mask, labels, **self.options(batch)).loss
        ids, mask = ids[:, self.sequences.places :], mask[:, self.sequences.places :]
        return self.model(None, ids, mask, torch.where(mask, ids, -100)).loss

    def options(self, batch: VideoBatch) -> dict[str, Any]:
        """The questions, for the Q-Former."""
        return {
            "prompt_ids": batch.prompt_ids.to(self.device),
            "prompt_mask": batch.prompt_mask.to(self.device),
        }


@torch.no_grad()
def answers(model: Any, sequences: Any, videos: int) -> dict[str, float]:
    """Shares of held-out questions answered right: as they are, and with the frames in reverse, where the answer changes."""
    device, hits = next(model.parameters()).device, {"answers": 0, "answers, frames reversed": 0}
    for number in range(-(-videos // _BATCH)):
        batch = sequences.held_out(number, min(_BATCH, videos - number * _BATCH))
        options = {"prompt_ids": batch.prompt_ids.to(device), "prompt_mask": batch.prompt_mask.to(device)}
        for name, frames in zip(hits, (batch.images, batch.images.flip(2)), strict=True):
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            logits = model(frames.to(device), ids, mask, **options).logits
            hits[name] += int(right(logits.cpu(), batch).sum())
    return {name: count / videos for name, count in hits.items()}


def measure(model: Any, sequences: Any, stage: Stage) -> dict[str, Any]:
    """After a stage that learns from videos: `answers`."""
    if "videos" not in stage.losses:
        return {}
    with evaluating(model):
        return answers(model, sequences, HELD_OUT)
