"""qwen_vl-tiny through its stages on real pictures with captions, at both picture sizes."""

from __future__ import annotations

import pytest
import torch

from mmkernels import data, models
from mmkernels.data import Tokenizer
from mmkernels.models import Stage
from mmkernels.train import Run, Trainer
from mmkernels.train.evaluate import last_image
from mmkernels.train.qwen import QwenObjectives, dialogues


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lesson() -> QwenObjectives:
    torch.manual_seed(0)
    model: models.QwenVL = models.build("qwen_vl-tiny").train()  # type: ignore[assignment]
    dataset = data.build("digits")
    tokenizer = Tokenizer.train(dataset.captions, model.config.lm.vocab)
    return QwenObjectives(model, dialogues(dataset, tokenizer, model.config, 0), 4, "cpu")


def teach(lesson: QwenObjectives, stage: Stage, steps: int) -> list[float]:
    stage.freeze(lesson.model)
    optimizer = torch.optim.AdamW(lesson.parameters(stage), lr=stage.learning_rate)
    losses = []
    for number in range(steps):
        parts = [weight * lesson.loss(name, number, stage) for name, weight in stage.losses.items()]
        loss = torch.stack(parts).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lesson.model.parameters(), stage.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_stage_learns_what_it_trains(lesson):
    model = lesson.model
    table = model.vision.resampler.positions.clone()
    for stage, steps in zip(model.stages(), (6, 5, 3, 4), strict=True):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses = teach(lesson, stage, steps)
        assert losses[-1] < losses[0], stage.name
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n, p in model.named_parameters() if p.requires_grad}, stage.name
    assert torch.equal(model.vision.resampler.positions, table)
    score = last_image(model.eval(), lesson.sequences, 6)
    assert score.total == 6 and 0 <= score.right <= 6


def test_batches_are_what_the_model_reads(lesson):
    """Every image token has its slots; the answer's place is the caption's, also behind several pictures."""
    drawn, model, sizes = lesson.sequences, lesson.model, set()
    assert drawn.size == 64 and drawn.at(32).size == 32
    for batch in (
        drawn.pairs(0, 3), drawn.interleaved(0, 3), drawn.instructions(0, 3), drawn.held_out(0, 3), drawn.at(32).pairs(0, 3),
    ):  # fmt: skip
        assert batch.images.shape[2:] in ((3, 64, 64), (3, 32, 32))
        sizes.add(batch.images.shape[-1])
        model(batch.images, batch.input_ids, batch.attention_mask)  # refuses wrong slots
        for row, (start, end), caption in zip(
            batch.input_ids.tolist(), batch.answers.tolist(), batch.captions.tolist(), strict=True
        ):
            assert drawn.tokenizer.decode(row[start:end]) == drawn.dataset.captions[caption]
            assert row[end - 1] == drawn.tokenizer.end_of_chunk
    assert sizes == {32, 64}
    same, other = (drawn.instructions(0, 3), drawn.instructions(1, 3))
    assert torch.equal(same.images, drawn.instructions(0, 3).images) and not torch.equal(
        same.images, other.images
    )
    assert not torch.equal(same.images, drawn.held_out(0, 3).images)
    echo = drawn.echoes(0, 4)
    assert echo.images.shape == (4, 0, 3, 64, 64)
    for row, (start, end), caption in zip(
        echo.input_ids.tolist(), echo.answers.tolist(), echo.captions.tolist(), strict=True
    ):
        text = drawn.tokenizer.decode(row[start:end])
        shown = [token for token in row[:start] if token != lesson.model.marks.slot]
        assert start == 18 and text == drawn.dataset.captions[caption] == drawn.tokenizer.decode(shown)


def test_a_conversation_is_predicted_where_the_assistant_speaks(lesson):
    batch, stage, seen = lesson.sequences.instructions(0, 2), lesson.model.stages()[-1], []
    handle = lesson.model.register_forward_pre_hook(lambda _, given: seen.append(given))
    lesson.loss("instructions", 0, stage)
    handle.remove()
    images, ids, _, labels = seen[0]
    assert images.shape[-1] == 64
    for row, label, (start, end) in zip(ids, labels, batch.answers.tolist(), strict=False):
        assert torch.equal(label[start:end], row[start:end])
        predicted = set(label[:start].tolist()) - {-100}
        marks = lesson.model.marks
        assert predicted == {marks.turn, marks.newline, lesson.model.tokens.end_of_chunk}


def test_what_a_stage_may_not_name_is_refused(lesson):
    with pytest.raises(ValueError, match="loss 'songs' is unknown, expected one of pictures, echoes"):
        lesson.loss("songs", 0, lesson.model.stages()[0])
    tokenizer = Tokenizer.train(["".join(map(chr, range(300, 900)))] * 2, 600)
    config = lesson.model.config
    with pytest.raises(ValueError, match=r"data: its captions have \d+ tokens, expected at most 507"):
        dialogues(data.build("digits"), tokenizer, config, 0)


def test_the_training_loop_goes_through_the_stages(tmp_path):
    trainer = Trainer(Run(model="qwen_vl-tiny", steps=9, batch=1), tmp_path / "run")
    records = [trainer.take_step() for _ in range(trainer.run.total())]
    names = [stage.name for stage in trainer.model.stages()]
    assert sorted({r["stage"] for r in records}, key=names.index) == names
    assert trainer.score(2).total == 2
    trainer.save()
    again = Trainer(trainer.run, trainer.out)
    again.resume()
    state = trainer.model.state_dict()
    assert again.step == 9 and all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())
