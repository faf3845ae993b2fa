"""Qwen-VL is asked in the form it was trained with, with pictures of the stage where it stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of a run of a few steps: one of the second stage, and one of the last."""
    trainer = Trainer(Run(model="qwen_vl-tiny", steps=9, batch=1), tmp_path_factory.mktemp("qwen") / "run")
    folders = {}
    for _ in range(trainer.run.total()):
        stage = trainer.take_step()["stage"]
        folders[stage] = trainer.save()
        if stage == "pretrain" and "early" not in folders:
            folders["early"] = folders[stage].rename(folders[stage].parent.parent / "early")
    return trainer, folders


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def test_pictures_have_the_size_of_the_checkpoint_s_stage(run):
    _, folders = run
    assert Captioner.from_checkpoint(folders["chat"]).size == 64
    assert Captioner.from_checkpoint(folders["early"]).size == 32
    (folders["early"] / "checkpoint.json").unlink()
    assert Captioner.from_checkpoint(folders["early"]).size == 64


def test_the_prompt_is_a_turn_of_the_conversations_it_learned_from(run, picture, monkeypatch):
    trainer, folders = run
    captioner, given = Captioner.from_checkpoint(folders["chat"]), []

    def generate(pixels, ids, mask, *, max_new_tokens):
        given.append((pixels, ids))
        return torch.tensor([[*captioner.tokenizer.encode(" a cat"), 3, 0]])

    monkeypatch.setattr(captioner.model, "generate", generate)
    assert captioner.caption([picture]) == "a cat"
    (pixels, ids), learned = given[0], trainer.sequences.instructions(0, 1)
    assert pixels.shape == (1, 1, 3, 64, 64)
    start = int(learned.answers[0, 0])
    assert ids.tolist() == learned.input_ids[:, :start].tolist()
    captioner.caption([picture, picture], "which?")
    captioner.caption([picture], "is <image> a cat?")
    two, held = (row[0].tolist() for _, row in given[1:])
    text = captioner.tokenizer.decode([t for t in two if t < 500])
    assert "Picture 1: Picture 2: which?" in text and two.count(2) == 2
    assert "Picture" not in captioner.tokenizer.decode([t for t in held if t < 500])


def test_it_answers(run, picture):
    _, folders = run
    captioner = Captioner.from_checkpoint(folders["chat"])
    assert captioner.caption([picture], max_new_tokens=3) == captioner.caption(
        [picture], "what is this?", max_new_tokens=3
    )
