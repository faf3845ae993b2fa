"""Training on videos: each loss learns, the questions reach the Q-Former, and what is measured tells order from content."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from learning import losses_of
from PIL import Image

from mmkernels import data, models
from mmkernels.infer import Captioner
from mmkernels.train import Run, train, trainer, video
from mmkernels.train.video import VideoObjectives


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    dataset, model = data.build("digits"), models.build("llama-vid-tiny")
    videos = data.Videos(dataset, data.Tokenizer.train(dataset.captions, 512), 32, frames=2)
    return model, videos


@pytest.mark.parametrize("name", ["pictures", "text", "videos"])
def test_every_loss_learns_its_batch(setting, name):
    model, videos = setting
    stage = model.stages()[-1 if name == "videos" else 0]
    losses = losses_of(lambda: VideoObjectives(model, videos, 4, "cpu"), model, stage, name)
    assert losses[-1] < 0.7 * losses[0]


def test_the_stages_name_losses_that_exist(setting):
    model, videos = setting
    objectives = VideoObjectives(model, videos, 4, "cpu")
    assert {name for stage in model.stages() for name in stage.losses} == set(objectives.names())
    with pytest.raises(ValueError, match="loss 'pairs' is unknown, expected one of pictures, text, videos"):
        objectives.loss("pairs", 0, replace(model.stages()[0], losses={"pairs": 1.0}, mix={"pairs": 1.0}))


def test_a_run_from_its_first_stage_to_an_answer(tmp_path, monkeypatch):
    """Three stages of a step each, the figures of the last two, and a checkpoint that answers about pictures."""
    monkeypatch.setattr(video, "HELD_OUT", 4)
    monkeypatch.setattr(trainer, "HELD_OUT", 8)
    steps = {stage.name: stage.steps for stage in models.config("llama-vid-tiny").stages}
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    result = train(Run(model="llama-vid-tiny", steps=3, batch=2), tmp_path / "run")
    assert list(result.held_out) == list(steps)[1:] and result.documents == 8
    assert set(result.held_out["instruction"]) == {"answers", "answers, frames reversed"}
    captioner = Captioner.from_checkpoint(tmp_path / "run")
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    told = captioner.caption(pictures, "what is at last?", max_new_tokens=4)
    model, words = captioner.model, captioner.tokenizer.encode("what is at last?")
    prompt = torch.tensor([[words]])
    clip = captioner._pixels(pictures).unsqueeze(1)  # the two pictures as two frames of one video
    ids = torch.tensor([[2] * 4 + words])
    answer = model.generate(clip, ids, prompt_ids=prompt, max_new_tokens=4)
    assert told == captioner.tokenizer.decode(answer[0].tolist()).strip()


class Oracle(torch.nn.Module):
    """Knows every answer of a batch whose frames are in order, and nothing else."""

    def __init__(self, videos):
        super().__init__()
        self.batches = [videos.held_out(n, 4) for n in range(2)]
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, images, ids, mask, *, prompt_ids, prompt_mask):
        assert prompt_ids.shape == prompt_mask.shape and not self.training
        ordered = any(torch.equal(images, batch.images) for batch in self.batches)
        self.calls.append(ordered)
        truth = torch.nn.functional.one_hot(ids.roll(-1, 1), 512).float()
        return SimpleNamespace(logits=truth if ordered else -truth)


def test_what_is_measured(setting, monkeypatch):
    model, videos = setting
    monkeypatch.setattr(video, "_BATCH", 4)
    monkeypatch.setattr(video, "HELD_OUT", 8)
    oracle = Oracle(videos).train()
    found = video.measure(oracle, videos, model.stages()[-1])
    assert found == {"answers": 1.0, "answers, frames reversed": 0.0}
    assert oracle.calls == [True, False] * 2 and oracle.training
    assert video.measure(oracle, videos, model.stages()[0]) == {}
