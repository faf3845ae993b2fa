"""Training before an encoder-decoder: its encoder reads what stands before an answer, its decoder writes the answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmkernels.data import Batch
from mmkernels.models import Stage
from mmkernels.models.base import IGNORE
from mmkernels.models.places import pad_rows
from mmkernels.train.qformer import QFormerObjectives


class Asked(NamedTuple):
    """Prompts, ids and mask `[B, P]`, and their answers as labels `[B, U]`: to the end of the chunk, -100 after it."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def asked(batch: Batch, pad: int) -> Asked:
    """What a batch's rows ask and how they are answered, apart."""
    rows = list(zip(batch.input_ids, batch.answers.tolist(), strict=True))
    ids, mask = pad_rows([row[:start] for row, (start, _) in rows], pad)
    labels, _ = pad_rows([row[start:end] for row, (start, end) in rows], IGNORE)
    return Asked(ids, mask, labels)


class Seq2SeqObjectives(QFormerObjectives):
    """As `QFormerObjectives`: stage 1 knows no language model, and the others' losses are those of the decoder's answers."""

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        if name not in ("echo", "captions", "instructions"):
            return super().loss(name, number, stage)
        draw = self.sequences.echoes if name == "echo" else self.sequences.captions
        batch = draw(number, self._size(name, stage.mix))
        return self._answered(self.model, batch, None if name == "echo" else batch.images)[0].loss

    def hits(self, model: Any, batch: Batch, pictures: Tensor) -> Tensor:
        output, labels = self._answered(model, batch, pictures)
        return ((output.logits.argmax(-1) == labels) | (labels == IGNORE)).all(1).cpu()

    def _answered(self, model: Any, batch: Batch, pictures: Tensor | None) -> tuple[Any, Tensor]:
        """The model's output about the batch, and the labels it was to write."""
        ids, mask, labels = (t.to(self.device) for t in asked(batch, self.sequences.tokenizer.pad))
        if pictures is None:
            return model(None, ids, mask, labels), labels
        return model(pictures.to(self.device), ids, mask, labels, **self.options(batch)), labels
