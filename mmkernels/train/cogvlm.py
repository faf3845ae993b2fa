"""Training of CogVLM: captions and boxes of scenes; how well a held-out object is found, and what guessing would give."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.data import Dataset, Grounding, SceneBatch, Tokenizer
from mmkernels.data.grounding import boxes_in, iou
from mmkernels.data.grounding import texts as scene_texts
from mmkernels.models import CogVLMConfig, Stage
from mmkernels.models.base import IGNORE, fill_places, next_token_loss
from mmkernels.models.cogvlm import Types
from mmkernels.train.evaluate import evaluating, shuffle
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH = 256, 64  # scenes that are tried when a stage with boxes ends, and at a time


def texts(dataset: Dataset, config: CogVLMConfig) -> list[str]:
    """With the sides of boxes: a number of three digits is one token then, as captions' words are."""
    return scene_texts(dataset, config.vision.image_size)


def grounding(dataset: Dataset, tokenizer: Tokenizer, config: CogVLMConfig, seed: int) -> Grounding:
    return Grounding(dataset, tokenizer, config.vision.image_size, seed=seed, places=config.places)


class CogVLMObjectives(Objectives):
    """`patches`: the tower tells, for every patch, which object covers its centre and in which pixels that object's sides are.
    `echoes`: the language model alone is told the same by a code at every place, and answers. `captions`, `boxes`: its answers
    behind a scene. What reads the patches and what makes the codes (`Sight`) are thrown away after the stage.
    """

    model: Any
    sequences: Any

    def __init__(self, model: Any, sequences: Grounding, batch: int, device: str) -> None:
        super().__init__(model, sequences, batch, device)
        kinds, widths = (
            len(sequences.dataset.captions) + 1,
            (model.config.vision.width, model.config.lm.block.width),
        )
        self.head = Sight(kinds, sequences.size, *widths).to(device)

    def names(self) -> tuple[str, ...]:
        return ("patches", "echoes", "captions", "boxes")

    def begin(self, stage: Stage) -> None:
        """Vision experts start as the text's weights that the stage before has trained."""
        if stage.name == "captioning":
            self.model.copy_text_to_vision()

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
        if name == "patches":
            return self._patches(*(t.to(self.device) for t in self.sequences.scenes(number, size)))
        if name == "echoes":
            return self._echoes(*self.sequences.echoes(number, size))
        batch = getattr(self.sequences, name)(number, size)
        ids, mask, labels = (t.to(self.device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
        return self.model(batch.images.to(self.device), ids, mask, labels).loss

    def _patches(self, pixels: Tensor, captions: Tensor, boxes: Tensor) -> Tensor:
        kinds, sides = self.head.read(self.model.vision(pixels)[:, 1:])
        what, where = (
            F.cross_entropy(found.flatten(0, -2), true.flatten(), ignore_index=IGNORE)
            for found, true in zip((kinds, sides), self._shown(captions, boxes), strict=True)
        )
        return what + where

    def _shown(self, captions: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """What the patches show: kind `[B, P]`, the last one being nothing, and sides in pixels `[B, P, 4]`, -100 there."""
        owner, covered = owners(
            boxes, self.model.config.vision.image_size // self.model.config.vision.patch_size
        )
        kind = torch.where(covered, captions.gather(1, owner), self.head.kinds - 1)
        box = (boxes * self.sequences.size).round().long()
        side = box.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))
        return kind, torch.where(covered.unsqueeze(-1), side, IGNORE)

    def _echoes(self, batch: SceneBatch, *objects: Tensor) -> Tensor:
        """The text's weights at every place, where a picture's will stand."""
        model = self.model
        ids, mask, labels = (t.to(self.device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
        place = ids == model.tokens.image
        codes = self.head.code(*self._shown(*(t.to(self.device) for t in objects)))
        x = fill_places(model.lm.embed(ids), place, codes)
        x, seen = model.place(x, mask, None, Types(place.long(), plain=True))
        for index in range(len(model.lm.blocks)):
            x = model.block(index, x, seen, None)
        return next_token_loss(model.lm.logits(x), labels)


class Sight(nn.Module):
    """What a patch shows, read from the tower's features and written for the language model: an object's kind and sides."""

    def __init__(self, kinds: int, size: int, vision: int, text: int) -> None:
        super().__init__()
        self.kinds, self.sides = kinds, size + 1
        self.reader = nn.Linear(vision, kinds + 4 * self.sides)
        self.codes = nn.Embedding(kinds + 4 * self.sides, text)
        nn.init.normal_(self.codes.weight, std=0.3)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, P, width]` -> logits of the kind `[B, P, kinds]` and of the sides `[B, P, 4, size + 1]`."""
        told = self.reader(features).float()
        return told[..., : self.kinds], told[..., self.kinds :].unflatten(-1, (4, -1))

    def code(self, kind: Tensor, side: Tensor) -> Tensor:
        """kind `[B, P]` and sides `[B, P, 4]`, -100 where there are none -> `[B, P + 2, C]`, zero at begin and end."""
        known, offset = side != IGNORE, self.kinds + self.sides * torch.arange(4, device=side.device)
        sides = self.codes(torch.where(known, side, 0) + offset) * known.unsqueeze(-1)
        return F.pad(self.codes(kind) + sides.sum(-2), (0, 0, 1, 1))


def owners(boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """For patches `[B, side^2]`, row by row, which of the boxes `[B, K, 4]` holds the patch's centre, and whether one does."""
    at = (torch.arange(side, device=boxes.device) + 0.5) / side
    y, x = (t.flatten() for t in torch.meshgrid(at, at, indexing="ij"))
    x0, y0, x1, y1 = (t.unsqueeze(-1) for t in boxes.unbind(-1))
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return inside.to(torch.uint8).argmax(1), inside.any(1)


@torch.no_grad()
def found(model: Any, sequences: Any, batch: SceneBatch, images: Tensor) -> list[list[tuple[float, ...]]]:
    """The boxes that the model writes for every row of a batch, with its own pictures or others."""
    device = next(model.parameters()).device
    asked = torch.arange(batch.input_ids.shape[1]) < batch.answers[:, :1]
    ids = torch.where(asked, batch.input_ids, sequences.tokenizer.pad)
    longest = int((batch.answers[:, 1] - batch.answers[:, 0]).max())
    answers = model.generate(
        images.to(device), ids.to(device), asked.to(device), max_new_tokens=longest
    ).tolist()
    return [boxes_in(sequences.tokenizer.decode(answer)) for answer in answers]


def measure(model: Any, sequences: Any, stage: Stage) -> dict[str, Any]:
    """After a stage that learns boxes: intersection over union with the held-out truth, 0 where no box is written."""
    if "boxes" not in stage.losses:
        return {}
    overlaps: dict[str, list[Tensor]] = {
        "mean IoU": [],
        "mean IoU, pictures shuffled": [],
        "mean IoU of the mean box": [],
    }
    written, mean = 0, sequences.mean_box()
    with evaluating(model):
        for number in range(-(-HELD_OUT // _BATCH)):
            batch = sequences.held_out_boxes(number, min(_BATCH, HELD_OUT - number * _BATCH))
            boxes = found(model, sequences, batch, batch.images)
            others = found(model, sequences, batch, shuffle(batch))
            written += sum(map(bool, boxes))
            guessed = [[tuple(mean.tolist())]] * len(boxes)
            for name, tried in zip(overlaps, (boxes, others, guessed), strict=True):
                first = torch.tensor([row[0] if row else (0.0,) * 4 for row in tried])
                overlaps[name].append(iou(first, batch.boxes))
    figures = {name: float(torch.cat(values).mean()) for name, values in overlaps.items()}
    hits = torch.cat(overlaps["mean IoU"]) >= 0.5
    return {**figures, "IoU of 0.5 or more": float(hits.float().mean()), "boxes written": written / HELD_OUT}
