"""Training of MoE-LLaVA: answers about pictures, dense and then with experts; who is right, and which experts are busy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.data import Batch, Dataset, Pairs, Tokenizer
from mmkernels.layers.moe import MoE
from mmkernels.models import MoeLlavaConfig, Stage
from mmkernels.models.base import IGNORE, next_token_loss
from mmkernels.models.moe_llava import BALANCE
from mmkernels.train.evaluate import evaluating, last_image
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH = 256, 64  # pictures that are tried when a stage ends, and at a time
MODALITIES = ("image", "text")


def pairs(dataset: Dataset, tokenizer: Tokenizer, config: MoeLlavaConfig, seed: int) -> Pairs:
    """The data of a run: a picture's places, a question, a caption."""
    return Pairs(dataset, tokenizer, config.vision.image_size, seed=seed, places=config.places, asks=True)


def plain(s: Pairs) -> Pairs:
    """The same pictures, of which nothing is asked."""
    return Pairs(s.dataset, s.tokenizer, s.size, seed=s.seed, places=s.places)


class MoeLlavaObjectives(Objectives):
    """`pictures`: the mean patch tells the caption's number. The others predict captions: `echoes` behind their own words in
    the places of a picture, `captions` behind the picture, `instructions` behind the picture and a question. `balance` is the
    experts' balancing loss in the last of these passes.
    """

    model: Any
    sequences: Any

    def __init__(self, model: Any, sequences: Pairs, batch: int, device: str) -> None:
        super().__init__(model, sequences, batch, device)
        self.plain = plain(sequences)

    def names(self) -> tuple[str, ...]:
        return ("pictures", "echoes", "captions", "instructions", BALANCE)

    def passes(self, stage: Stage) -> list[tuple[str, ...]]:
        names = [name for name in stage.losses if name != BALANCE]
        last = (names[-1], BALANCE) if BALANCE in stage.losses else (names[-1],)
        return [*((name,) for name in names[:-1]), last]

    def losses(self, names: tuple[str, ...], number: int, stage: Stage) -> dict[str, Tensor]:
        if names[0] == "pictures" or names[0] not in self.names():
            return super().losses(names, number, stage)
        draw = {
            "echoes": self.plain.echoes,
            "captions": self.plain.captions,
            "instructions": self.sequences.captions,
        }
        batch: Batch = draw[names[0]](number, self._size(names[0], stage.mix))
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        images: Tensor | None = batch.images.to(self.device)
        if names[0] == "echoes":  # words stand in the places, and nothing in the others
            images, ids = None, torch.where(ids == self.model.tokens.image, self.model.tokens.pad, ids)
        output: Any = self.model(images, ids, mask)
        found = {names[0]: next_token_loss(output.logits, answer_labels(batch).to(self.device))}
        return found | dict.fromkeys(names[1:], output.aux_loss)

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        if name == "pictures" or name not in self.names():
            return super().loss(name, number, stage)
        return self.losses((name,), number, stage)[name]


def answer_labels(batch: Batch) -> Tensor:
    """The answers, and the end of text that follows each."""
    position = torch.arange(batch.input_ids.shape[1])
    inside = (position >= batch.answers[:, :1]) & batch.attention_mask
    return torch.where(inside, batch.input_ids, IGNORE)


@torch.no_grad()
def expert_use(model: Any, sequences: Pairs, pictures: int) -> dict[str, Any]:
    """Which share of its routes each modality sends to each expert, layer by layer, on held-out pictures.

    `layers` are their numbers; `image` and `text` have a list of E shares for each of them. Padding does not count.
    """
    device = next(model.parameters()).device
    moes = [block.mlp for block in model.lm.blocks if isinstance(block.mlp, MoE)]
    counts = torch.zeros(len(moes), len(MODALITIES), moes[0].experts, dtype=torch.int64)
    for number in range(-(-pictures // _BATCH)):
        batch = sequences.held_out(number, min(_BATCH, pictures - number * _BATCH))
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        routings = model(batch.images.to(device), ids, mask).routings
        place = (ids == model.tokens.image).flatten()
        for layer, routing in enumerate(routings):
            for n, these in enumerate((place, mask.flatten() & ~place)):
                chosen = routing.experts[these].flatten().long().cpu()
                counts[layer, n] += torch.bincount(chosen, minlength=moes[0].experts)
    shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
    use = {name: [layer[n] for layer in shares] for n, name in enumerate(MODALITIES)}
    return {"layers": list(model.layers), **use}


def measure(model: Any, sequences: Pairs, stage: Stage) -> dict[str, Any]:
    """After each stage: held-out captions with the picture and with another one, with a question where the stage has questions;
    with experts, how busy each of them is.
    """
    asked = sequences if "instructions" in stage.losses else plain(sequences)
    hits = MoeLlavaObjectives(model, sequences, 1, str(next(model.parameters()).device)).hits
    with evaluating(model):
        figures: dict[str, Any] = {
            name: last_image(model, asked, HELD_OUT, shuffled=other, hits=hits).accuracy
            for name, other in (("with the picture", False), ("with another picture", True))
        }
        if BALANCE in stage.losses:
            use = expert_use(model, sequences, HELD_OUT)
            busiest = [max(share) for name in MODALITIES for share in use[name]]
            figures |= {"share of the busiest expert": max(busiest), "experts": use}
    return figures
