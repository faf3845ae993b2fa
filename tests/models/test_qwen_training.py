"""qwen_vl-tiny through its four stages on real pictures with captions, at both picture sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import data, models
from mmkernels.data import Sequences, Tokenizer
from mmkernels.models import Stage
from mmkernels.models.qwen_text import chatml_ids, chatml_labels, text_labels

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
BATCH = 6


class Lesson:
    """A model and the batches that its stages name."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = models.build("qwen_vl-tiny").train()
        dataset = data.build("digits")
        lowest = min(vars(self.model.marks).values())
        self.tokenizer = Tokenizer.train(dataset.captions, lowest)
        self.sequences = {side: Sequences(dataset, self.tokenizer, side) for side in (32, 64)}
        self.head = torch.nn.Linear(128, len(dataset.captions))

    def loss(self, name: str, stage: Stage, number: int) -> Tensor:
        drawn = self.sequences[stage.image_size or 32]
        if name == "pictures":
            pixels, captions = drawn.pictures(number, 4 * BATCH)
            return F.cross_entropy(self.head(self.model.vision.tower(pixels).mean(1)), captions)
        batch = drawn.interleaved(number, BATCH) if name == "interleaved" else drawn.pairs(number, BATCH)
        ids, mask, images = batch.input_ids, batch.attention_mask, batch.images
        if name == "text":  # the captions alone
            images, mask = None, mask & (ids != self.model.tokens.image)
            ids, mask = ids[:, 1:], mask[:, 1:]
        if name == "instructions":
            ids, mask = self._chat(drawn.dataset.captions, batch.captions.tolist())
        ids, mask = self.model.expand(ids, mask)
        if name == "instructions":
            labels = chatml_labels(ids, self.model.tokens, self.model.marks, mask)
        else:
            labels = text_labels(ids, self.model.tokens, self.model.marks, self.model.config.slots, mask)
        loss = self.model(images, ids, mask, labels).loss
        assert loss is not None
        return loss

    def _chat(self, captions: tuple[str, ...], numbers: list[int]) -> tuple[Tensor, Tensor]:
        rows = []
        for number in numbers:
            turns = [("user", "<image>what is this?"), ("assistant", captions[number])]
            rows.append(
                torch.tensor(chatml_ids(turns, self.tokenizer.encode, self.model.tokens, self.model.marks))
            )
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids, ids != self.model.tokens.pad

    def teach(self, stage: Stage, steps: int) -> list[float]:
        stage.freeze(self.model)
        groups = [*stage.parameter_groups(self.model), {"params": self.head.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, weight_decay=0.0)
        losses = []
        for number in range(steps):
            loss = sum(weight * self.loss(name, stage, number) for name, weight in stage.losses.items())
            assert isinstance(loss, Tensor)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"]], stage.clip
            )
            optimizer.step()
            losses.append(loss.item())
        return losses


def test_the_stages_learn_from_real_pictures():
    lesson = Lesson()
    model = lesson.model
    table = model.vision.resampler.positions.clone()
    for stage, steps in zip(model.stages(), (6, 5, 3, 4), strict=True):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses = lesson.teach(stage, steps)
        assert losses[-1] < losses[0], stage.name
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        expected = {n for n, p in model.named_parameters() if p.requires_grad}
        if stage.name == "towers":  # captions alone: the resampler, its norm and projection wait
            assert changed == expected
        assert changed == expected, stage.name
    assert torch.equal(model.vision.resampler.positions, table)
    answer = model.eval().generate(*_question(lesson), max_new_tokens=3)
    assert answer.shape[0] == 1


def _question(lesson: Lesson) -> tuple[Tensor, Tensor]:
    marks, encode = lesson.model.marks, lesson.tokenizer.encode
    ids = chatml_ids([("user", "<image>what is this?")], encode, lesson.model.tokens, marks)
    ids += [marks.turn, marks.assistant, marks.newline]
    return torch.randn(1, 1, 3, 64, 64), lesson.model.expand(torch.tensor([ids]))[0]
