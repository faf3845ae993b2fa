"""The losses that a stage may name, each on its own numbered batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.data import Batch, Sequences
from mmkernels.models import Stage, flamingo_labels
from mmkernels.train.evaluate import right


class Objectives:
    """Draws the batches of a step and computes their losses.

    `pictures`: the vision tower's mean patch, through a linear head that is thrown away after the stage, tells the caption's
    number. `text`: the language model alone on the documents' text. `pairs`, `interleaved`: captions given their pictures.
    """

    def __init__(self, model: Any, sequences: Sequences, batch: int, device: str) -> None:
        self.model, self.sequences, self.batch, self.device = model, sequences, batch, device
        self.head = nn.Linear(model.config.vision.width, len(sequences.dataset.captions)).to(device)

    def names(self) -> tuple[str, ...]:
        return ("pictures", "text", "pairs", "interleaved")

    def begin(self, stage: Stage) -> None:
        """What happens to the model before the first step of a later stage."""

    def passes(self, stage: Stage) -> list[tuple[str, ...]]:
        """The stage's losses in groups that share a pass; a step goes backward after each."""
        return [(name,) for name in stage.losses]

    def losses(self, names: tuple[str, ...], number: int, stage: Stage) -> dict[str, Tensor]:
        """The losses of one pass."""
        return {name: self.loss(name, number, stage) for name in names}

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        """The loss `name` on its batch `number`, of the size that the stage's mix asks for."""
        if name not in self.names():
            raise ValueError(
                f"stage {stage.name!r}: loss {name!r} is unknown, expected one of {', '.join(self.names())}"
            )
        size = self._size(name, stage.mix)
        if name == "pictures":
            pixels, captions = self.sequences.pictures(number, size)
            features = self.model.vision(pixels.to(self.device)).mean(1)
            return F.cross_entropy(self.head(features).float(), captions.to(self.device))
        draw = self.sequences.pairs if name == "pairs" else self.sequences.interleaved
        return self._captions(draw(number, size), chunks=name == "interleaved", see=name != "text")

    def options(self, batch: Batch) -> dict[str, Any]:
        """What else the model is told of a batch that it is tried on."""
        return {}

    def hits(self, model: Any, batch: Batch, pictures: Tensor) -> Tensor:
        """bool `[B]`: whether greedy decoding gives each row's last caption, with these pictures."""
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        return right(model(pictures, ids, mask, **self.options(batch)).logits.cpu(), batch)

    def parameters(self, stage: Stage) -> list[dict]:
        """The optimizer's groups: what the stage trains of the model, and the head while it is needed."""
        groups = stage.parameter_groups(self.model)
        if "pictures" in stage.losses:
            groups.append({"params": list(self.head.parameters()), "weight_decay": 0.0})
        return groups

    def _size(self, name: str, mix: Mapping[str, float]) -> int:
        return round(self.batch * mix[name] / min(mix.values()))

    def _captions(self, batch: Batch, *, chunks: bool, see: bool) -> Tensor:
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        labels = flamingo_labels(ids, self.model.tokens, mask, interleaved=chunks)
        loss = self.model(batch.images.to(self.device) if see else None, ids, mask, labels).loss
        assert isinstance(loss, torch.Tensor)  # labels were given
        return loss
