"""Training on scenes: each loss learns, experts start where the text's weights are, the text stays, boxes are compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from learning import losses_of

from mmkernels import data, models
from mmkernels.data.grounding import box_text
from mmkernels.infer import Captioner
from mmkernels.train import Run, cogvlm, train, trainer
from mmkernels.train.cogvlm import CogVLMObjectives, owners


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    dataset, model = data.build("digits"), models.build("cogvlm-tiny")
    scenes = cogvlm.grounding(
        dataset, data.Tokenizer.train(cogvlm.texts(dataset, model.config), 512), model.config, 0
    )
    return model, scenes


@pytest.mark.parametrize("name", ["patches", "echoes", "captions", "boxes"])
def test_every_loss_learns_its_batch(setting, name):
    model, scenes = setting
    stage = model.stages()[0 if name in ("patches", "echoes") else 3]
    losses = losses_of(lambda: CogVLMObjectives(model, scenes, 4, "cpu"), model, stage, name)
    assert losses[-1] < 0.8 * losses[0]


def test_the_stages_name_losses_that_exist(setting):
    model, scenes = setting
    objectives = CogVLMObjectives(model, scenes, 4, "cpu")
    assert {name for stage in model.stages() for name in stage.losses} == set(objectives.names())
    with pytest.raises(ValueError, match="loss 'pairs' is unknown, expected one of patches, echoes"):
        objectives.loss("pairs", 0, replace(model.stages()[0], losses={"pairs": 1.0}, mix={"pairs": 1.0}))


def test_a_patch_is_its_object_s():
    boxes = torch.tensor([[[0.0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]]])
    owner, covered = owners(boxes, 4)
    assert covered.view(4, 4).long().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert owner.view(4, 4)[2:, 2:].eq(1).all() and owner.view(4, 4)[0, :2].eq(0).all()


def test_a_run_from_its_first_stage_to_a_box(tmp_path, monkeypatch):
    """Four stages of a step each: the text's weights stay from the second on, and the experts start as they are then."""
    monkeypatch.setattr(cogvlm, "HELD_OUT", 4)
    monkeypatch.setattr(trainer, "HELD_OUT", 4)
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    states, begin = [], CogVLMObjectives.begin

    def began(self, stage):
        begin(self, stage)
        states.append((stage.name, {n: p.detach().clone() for n, p in self.model.named_parameters()}))

    monkeypatch.setattr(CogVLMObjectives, "begin", began)
    result = train(Run(model="cogvlm-tiny", steps=4, batch=2), tmp_path / "run")
    assert [name for name, _ in states] == ["captioning", "referring", "sft"]
    first = states[0][1]
    experts = [n for n in first if n.startswith("lm.") and ".vision." in n]
    assert all(torch.equal(first[n], first[n.replace(".vision.", ".text.")]) for n in experts)
    captioner = Captioner.from_checkpoint(tmp_path / "run")
    for name, p in captioner.model.named_parameters():
        if name.startswith("lm.") and name not in experts:
            assert all(torch.equal(p, state[name]) for _, state in states), name
    assert not any(torch.equal(captioner.model.get_parameter(n), first[n]) for n in experts)
    assert list(result.held_out) == ["referring", "sft"] and result.documents == 4
    assert {"mean IoU", "mean IoU of the mean box"} <= set(result.held_out["sft"])
    dataset = data.build("digits")
    picture = data.images.Image.fromarray(dataset.held_out[3][0].pixels)
    told = captioner.caption([picture], "where is a handwritten three?", max_new_tokens=3)
    assert isinstance(told, str)


class Oracle(torch.nn.Module):
    """Writes the box of every held-out scene that it is shown, and nothing about others."""

    def __init__(self, scenes):
        super().__init__()
        self.scenes, self.weight = scenes, torch.nn.Parameter(torch.zeros(1))
        self.batches = [scenes.held_out_boxes(n, 4) for n in range(2)]

    def generate(self, images, ids, mask, *, max_new_tokens):
        assert not self.training
        batch = next((b for b in self.batches if torch.equal(b.images, images)), None)
        if batch is None:
            return torch.full((4, max_new_tokens), self.scenes.tokenizer.pad)
        for row in range(4):  # the answer is not among what it is given
            asked = int(batch.answers[row, 0])
            assert torch.equal(ids[row][mask[row]], batch.input_ids[row, :asked])
        rows = [self.scenes.tokenizer.encode(box_text(box)) for box in batch.boxes.tolist()]
        return torch.tensor([row + [1] * (max_new_tokens - len(row)) for row in rows])


def test_what_is_measured(setting, monkeypatch):
    model, scenes = setting
    monkeypatch.setattr(cogvlm, "_BATCH", 4)
    monkeypatch.setattr(cogvlm, "HELD_OUT", 8)
    figures = cogvlm.measure(Oracle(scenes).train(), scenes, model.stages()[-1])
    assert figures["mean IoU"] > 0.98 and figures["IoU of 0.5 or more"] == figures["boxes written"] == 1
    assert figures["mean IoU, pictures shuffled"] == 0
    assert 0.05 < figures["mean IoU of the mean box"] < 0.3
    assert cogvlm.measure(model, scenes, model.stages()[0]) == {}
