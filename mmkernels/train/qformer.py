"""Training of BLIP-2's family: stage 1's three losses from one pass, captions, instructions; recall and captions measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.data import Batch, Pairs
from mmkernels.models import Blip2, Stage
from mmkernels.models.qformer import Instruction, instruction_labels
from mmkernels.models.retrieval import contrast_scores, match_scores, recall
from mmkernels.train.evaluate import evaluating
from mmkernels.train.objectives import Objectives

_STAGE1 = ("itc", "itm", "lm")
PICTURES, TOP = 200, 16  # held-out pictures of the retrieval; how many of a row are re-ranked
SHOWN = 5  # captions that are written out


class QFormerObjectives(Objectives):
    """`itc`, `itm`, `lm`: stage 1 on one batch of pairs, whose captions' numbers say which pictures mean the same.

    `captions`, `instructions`: the language model's loss on captions behind their pictures, and behind a question. `echo`: the
    language model alone on captions that their beginning tells; one that ignores it could not be told by queries either.
    """

    model: Any
    sequences: Any

    def names(self) -> tuple[str, ...]:
        return ("pictures", "echo", *_STAGE1, "captions", "instructions")

    def passes(self, stage: Stage) -> list[tuple[str, ...]]:
        together = tuple(name for name in stage.losses if name in _STAGE1)
        alone = [(name,) for name in stage.losses if name not in _STAGE1]
        return [*([together] if together else []), *alone]

    def losses(self, names: tuple[str, ...], number: int, stage: Stage) -> dict[str, Tensor]:
        if names[0] not in _STAGE1:
            return super().losses(names, number, stage)
        batch = self.sequences.pairs(number, self._size(names[0], stage.mix))
        found = self.model.stage1(
            batch.images[:, 0].to(self.device),
            batch.input_ids.to(self.device),
            batch.attention_mask.to(self.device),
            batch.captions.to(self.device),
        )
        return {name: getattr(found, name) for name in names}

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        if name not in ("echo", "captions", "instructions"):
            return super().loss(name, number, stage)
        draw = self.sequences.echoes if name == "echo" else self.sequences.captions
        batch = draw(number, self._size(name, stage.mix))
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        labels = instruction_labels(ids, mask, batch.answers[:, 0].to(self.device))
        if name == "echo":
            return self.model(None, ids, mask, labels).loss
        return self.model(batch.images.to(self.device), ids, mask, labels, **self.options(batch)).loss

    def options(self, batch: Batch) -> dict[str, Any]:
        return {"instruction": instruction(self.model, self.sequences, batch)}


def instruction(model: Any, sequences: Pairs, batch: Batch) -> Instruction | None:
    """What the queries are told about a batch; None for queries that read nothing."""
    if not model.config.instruct:
        return None
    device = next(model.parameters()).device
    return Instruction(*(t.to(device) for t in sequences.question(batch)))


def measure(model: Blip2, sequences: Pairs, stage: Stage) -> dict[str, Any]:
    """After stage 1 the recall at 1 and 5, both ways, by contrast and after matching; after the last stage some captions."""
    with evaluating(model):
        if set(_STAGE1) & set(stage.losses):
            return _retrieval(model, sequences)
        if "captions" in stage.losses or "instructions" in stage.losses:
            return {"captions": _captions(model, sequences)}
    return {}


@torch.no_grad()
def _retrieval(model: Blip2, sequences: Pairs) -> dict[str, Any]:
    """Held-out pictures against all captions."""
    device = next(model.parameters()).device
    pixels, captions = sequences.pictures(0, PICTURES, held_out=True)
    image = model.image_features(pixels.to(device))
    ids, mask = (t.to(device) for t in sequences.texts())
    relevant = (captions.unsqueeze(1) == torch.arange(len(ids))).to(device)
    assert model.heads is not None  # stage 1 has been trained
    scores = contrast_scores(model.qformer, model.heads, image, ids, mask)
    texts, images = match_scores(model.qformer, model.heads, image, ids, mask, scores, TOP)
    ways = {
        "itc image->caption": (scores, relevant), "itc caption->image": (scores.T, relevant.T),
        "itm image->caption": (texts, relevant), "itm caption->image": (images, relevant.T),
    }  # fmt: skip
    return {f"{way} recall@{k}": round(recall(*pair, k), 4) for way, pair in ways.items() for k in (1, 5)}


def _captions(model: Blip2, sequences: Pairs) -> list[list[str]]:
    """The true caption of some held-out pictures, and what the model writes."""
    batch, device = sequences.held_out(0, SHOWN), next(model.parameters()).device
    position = torch.arange(batch.input_ids.shape[1])
    mask = (position < batch.answers[:, :1]).to(device)
    told = instruction(model, sequences, batch)
    answers = model.generate(batch.images.to(device), batch.input_ids.to(device), mask, instruction=told)
    written = [sequences.tokenizer.decode(row).strip() for row in answers.tolist()]
    true = [sequences.dataset.captions[n] for n in batch.captions.tolist()]
    return [list(pair) for pair in zip(true, written, strict=True)]
