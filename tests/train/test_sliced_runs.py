"""Models that cut pictures train through all their stages, learn one batch, resume, are measured and asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learning import losses_of
from PIL import Image

from mmkernels import data, models
from mmkernels.data import Tokenizer
from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer
from mmkernels.train.sliced import SlicedObjectives, pictures, read, texts, words

NAMES = ("llava_uhd-tiny", "monkey-tiny", "fuyu-tiny", "slime-tiny")


@pytest.fixture(scope="module", params=NAMES)
def lesson(request) -> SlicedObjectives:
    torch.manual_seed(0)
    model, dataset = models.build(request.param), data.build("digits")
    tokenizer = Tokenizer.train(texts(dataset, model.config), words(model.config))
    return SlicedObjectives(model, pictures(dataset, tokenizer, model.config, 0), 2, "cpu")


def test_every_loss_learns_its_batch(lesson):
    stage = lesson.model.stages()[0]
    names = {name for s in lesson.model.stages() for name in s.losses}
    for name in sorted(names):
        chosen = next(s for s in lesson.model.stages() if name in s.losses)
        losses = losses_of(lambda: lesson, lesson.model, chosen, name, steps=5)
        assert losses[-1] < losses[0], (name, losses)
    with pytest.raises(ValueError, match="loss 'songs' is unknown, expected one of patches"):
        lesson.loss("songs", 0, stage)


def test_echoes_hold_the_answer(lesson):
    batch = lesson.sequences.instructions(0, 3)
    ids, mask, labels = lesson._echo(batch, 0)
    for n in range(3):
        said = batch.labels[n][batch.labels[n] != -100]
        assert torch.equal(labels[n][labels[n] != -100], said)
        places = ids[n, :24]
        assert (
            places[places != 3].tolist() == said[:-1].tolist()
            and mask[n].sum() == batch.attention_mask[n].sum() + 23
        )


def test_pages_are_measured(lesson):
    found = read(lesson.model.eval(), lesson.sequences, 3, (40, 40))
    assert set(found) == {"pages read", "pages read, shuffled"} and all(0 <= v <= 1 for v in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_training_loop_goes_through_the_stages_and_the_model_answers(name, tmp_path):
    count = 3 * len(models.config(name).stages)
    trainer = Trainer(Run(model=name, steps=count, batch=1), tmp_path / "run")
    records = [trainer.take_step() for _ in range(count)]
    stages = [stage.name for stage in trainer.model.stages()]
    assert sorted({r["stage"] for r in records}, key=stages.index) == stages
    assert trainer.score(2).total == 2 and trainer.score(2, shuffled=True).total == 2
    folder = trainer.save()
    again = Trainer(trainer.run, trainer.out)
    again.resume()
    state = trainer.model.state_dict()
    assert again.step == count and all(torch.equal(v, state[k]) for k, v in again.model.state_dict().items())
    captioner = Captioner.from_checkpoint(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))
    said = captioner.caption([picture], max_new_tokens=3)
    assert captioner.caption([picture], "what is this?", max_new_tokens=3) == said
    assert isinstance(captioner.caption([picture, picture], "which?", max_new_tokens=2), str)
    if name != "monkey-tiny":
        with pytest.raises(ValueError, match="video: got one for a model of pictures"):
            captioner.caption([picture], video=True)


def test_texts_that_need_too_many_tokens_are_refused():
    config = models.config("fuyu-tiny")
    tokenizer = Tokenizer.train(["".join(map(chr, range(300, 900)))] * 2, 600)
    with pytest.raises(ValueError, match=r"data: its captions have \d+ tokens, expected at most 509"):
        pictures(data.build("digits"), tokenizer, config, 0)
