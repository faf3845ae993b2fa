"""What Qwen-VL's stages learn from: pictures, captions, documents, and at last conversations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmkernels.data import Dataset, Dialogues, Tokenizer
from mmkernels.data.dialogues import QUESTION
from mmkernels.models import QwenVLConfig, Stage
from mmkernels.models.base import IGNORE
from mmkernels.models.qwen_text import chat_prompt, chatml_labels, text_labels
from mmkernels.train.objectives import Objectives


def words(config: QwenVLConfig) -> int:
    """How many tokens text has before those that mark images and turns."""
    m = config.marks
    return min(m.image_end, m.slot, m.turn, m.newline, m.assistant)


def dialogues(dataset: Dataset, tokenizer: Tokenizer, config: QwenVLConfig, seed: int) -> Dialogues:
    """The data of a run, with the pictures' size of its last stage: so they are held out.

    **Raises** ValueError when the captions' tokens reach those that the model marks images and turns with.
    """
    marks, tokens = config.marks, config.tokens
    if len(tokenizer) > words(config):
        raise ValueError(f"data: its captions have {len(tokenizer)} tokens, expected at most {words(config)}")
    opening = chat_prompt(QUESTION, 1, tokenizer.encode, tokens, marks)

    def talk(answer: list[int]) -> tuple[list[int], int]:
        return [*opening, *answer, marks.newline], len(opening)

    size = config.stages[-1].image_size or config.vision.image_size
    after = (*[marks.slot] * config.slots, marks.image_end)
    return Dialogues(dataset, tokenizer, size, seed=seed, after=after, talk=talk)


class QwenObjectives(Objectives):
    """The losses that Qwen-VL's stages name, each with pictures of the stage's size.

    `pictures` as for other families; `echoes`: captions behind their own words; `pairs`, `interleaved`: all text around
    the pictures; `instructions`: the assistant's turns of conversations, and the frame of every turn.
    """

    def __init__(self, model: Any, sequences: Dialogues, batch: int, device: str) -> None:
        super().__init__(model, sequences, batch, device)
        self._at = cache(sequences.at)

    def names(self) -> tuple[str, ...]:
        return ("pictures", "echoes", "pairs", "interleaved", "instructions")

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        """The loss `name` on its batch `number`, of the size that the stage's mix asks for."""
        if name not in self.names():
            known = ", ".join(self.names())
            raise ValueError(f"stage {stage.name!r}: loss {name!r} is unknown, expected one of {known}")
        config, size = self.model.config, self._size(name, stage.mix)
        drawn = self._at(stage.image_size or config.vision.image_size)
        if name == "pictures":
            pixels, captions = drawn.pictures(number, size)
            features = self.model.vision.tower(pixels.to(self.device)).mean(1)
            return F.cross_entropy(self.head(features).float(), captions.to(self.device))
        batch = getattr(drawn, name)(number, size)
        ids, mask, images = (x.to(self.device) for x in (batch.input_ids, batch.attention_mask, batch.images))
        if name == "instructions":
            labels = chatml_labels(ids, config.tokens, config.marks, mask)
        else:
            labels = text_labels(ids, config.tokens, config.marks, config.slots, mask)
        if name == "echoes":  # what stands in a picture's place is not predicted
            labels[:, : config.slots + 2] = IGNORE
        return self.model(images, ids, mask, labels).loss
