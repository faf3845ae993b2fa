"""Training of MoE-LLaVA: a LLaVA's answers, dense and then with experts, and which experts are busy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.data import Dataset, Photographs, Readings, Tokenizer
from mmkernels.data.readings import ReadingBatch
from mmkernels.layers.moe import MoE
from mmkernels.models import Stage
from mmkernels.models.base import next_token_loss
from mmkernels.models.moe_llava import BALANCE
from mmkernels.train import llava
from mmkernels.train.evaluate import evaluating, last_image
from mmkernels.train.llava import LlavaObjectives

HELD_OUT, _BATCH = 256, 64  # pictures that are tried when a stage ends, and at a time
MODALITIES = ("image", "text")


def photographs(dataset: Dataset, tokenizer: Tokenizer, config: Any, seed: int) -> Readings:
    """The data of a run: photographs and scans of many sizes, of which something is asked."""
    return llava.readings(dataset, tokenizer, config, seed, Photographs)


class MoeLlavaObjectives(LlavaObjectives):
    """As for other LLaVAs; `balance` is the experts' balancing loss in the last of a step's passes."""

    def names(self) -> tuple[str, ...]:
        return (*super().names(), BALANCE)

    def passes(self, stage: Stage) -> list[tuple[str, ...]]:
        names = [name for name in stage.losses if name != BALANCE]
        last = (names[-1], BALANCE) if BALANCE in stage.losses else (names[-1],)
        return [*((name,) for name in names[:-1]), last]

    def losses(self, names: tuple[str, ...], number: int, stage: Stage) -> dict[str, Tensor]:
        if BALANCE not in names:
            return super().losses(names, number, stage)
        drawn = self._at(stage.image_size or self.model.config.vision.image_size)
        batch: ReadingBatch = getattr(drawn, names[0])(number, self._size(names[0], stage.mix))
        output = self.run(self.model, batch, images=batch.images.to(self.device), plans=batch.plans)
        return {
            names[0]: next_token_loss(output.logits, batch.labels.to(self.device)),
            BALANCE: output.aux_loss,
        }


@torch.no_grad()
def expert_use(model: Any, sequences: Readings, pictures: int) -> dict[str, Any]:
    """Which share of its routes each modality sends to each expert, layer by layer, on held-out pictures.

    `layers` are their numbers; `image` and `text` have a list of E shares for each of them. Padding does not count.
    """
    device = next(model.parameters()).device
    moes = [block.mlp for block in model.lm.blocks if isinstance(block.mlp, MoE)]
    counts = torch.zeros(len(moes), len(MODALITIES), moes[0].experts, dtype=torch.int64)
    for number in range(-(-pictures // _BATCH)):
        batch = sequences.held_out(number, min(_BATCH, pictures - number * _BATCH))
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        routings = model(batch.images.to(device), ids, mask, plans=batch.plans).routings
        place = (ids == model.tokens.image).flatten()
        for layer, routing in enumerate(routings):
            for n, these in enumerate((place, mask.flatten() & ~place)):
                chosen = routing.experts[these].flatten().long().cpu()
                counts[layer, n] += torch.bincount(chosen, minlength=moes[0].experts)
    shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
    use = {name: [layer[n] for layer in shares] for n, name in enumerate(MODALITIES)}
    return {"layers": list(model.layers), **use}


def measure(model: Any, sequences: Readings, stage: Stage) -> dict[str, Any]:
    """After a stage that learns from pictures: held-out answers with the picture and with another one; with experts, how busy
    each of them is.
    """
    if not {"pairs", "instructions"} & {*stage.losses}:
        return {}
    right: Any = llava.hits
    with evaluating(model):
        figures: dict[str, Any] = {
            name: last_image(model, sequences, HELD_OUT, shuffled=other, hits=right).accuracy
            for name, other in (("with the picture", False), ("with another picture", True))
        }
        if BALANCE in stage.losses:
            use = expert_use(model, sequences, HELD_OUT)
            busiest = max(max(share) for name in MODALITIES for share in use[name])
            figures |= {"share of the busiest expert": busiest, "experts": use}
    return figures
