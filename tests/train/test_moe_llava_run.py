"""MoE-LLaVA's data and its run: losses that learn, experts' use and its picture, a run through all stages, resumed too."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import losses_of
from PIL import Image

from mmkernels import data, models
from mmkernels.infer import Captioner
from mmkernels.layers import MLP, MoE
from mmkernels.train import Run, Trainer, draw, moe_llava, train, trainer
from mmkernels.train.llava import texts as reading_texts
from mmkernels.train.moe_llava import MoeLlavaObjectives, expert_use, photographs


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting() -> tuple[Any, data.Readings]:
    torch.manual_seed(0)
    dataset, model = data.build("digits"), models.build("moe_llava-tiny")
    config: Any = model.config
    tokenizer = data.Tokenizer.train(reading_texts(dataset, config), 512)
    return model, photographs(dataset, tokenizer, config, 0)


@pytest.mark.parametrize(
    ("name", "stage"), [("patches", 0), ("echoes", 0), ("pairs", 1), ("instructions", 2), ("instructions", 3)]
)
def test_every_loss_learns_its_batch(setting, name, stage):
    model, drawn = setting
    chosen = model.stages()[stage]
    model.enter(chosen)
    losses = losses_of(
        lambda: MoeLlavaObjectives(model, drawn, 4, "cpu"), model, chosen, name, rate=5e-3, steps=10
    )
    assert losses[-1] < 0.9 * losses[0]


def test_balance_comes_from_the_pass_before_it(setting):
    model, drawn = setting
    stage, objectives = model.stages()[3], MoeLlavaObjectives(model, drawn, 4, "cpu")
    model.enter(stage)
    assert objectives.passes(stage) == [("instructions", "balance")]
    assert objectives.passes(model.stages()[0]) == [("patches",), ("echoes",)]
    found = objectives.losses(("instructions", "balance"), 0, stage)
    batch = drawn.instructions(0, 4)
    output = model(batch.images, batch.input_ids, batch.attention_mask, batch.labels)
    torch.testing.assert_close(found["instructions"] + 0.01 * found["balance"], output.loss)
    assert found["balance"] >= 1 and found["balance"].requires_grad
    with pytest.raises(ValueError, match="loss 'text' is unknown, expected one of patches, echoes, pairs"):
        objectives.loss("text", 0, replace(stage, mix={"text": 1.0}))


def test_use_of_experts_is_counted_by_modality():
    """A model that sends pictures to experts 0 and 1 and words to 2 and 3."""
    tokens = SimpleNamespace(image=2)
    ids = torch.tensor([[2, 2, 9, 9, 0], [2, 2, 9, 0, 0]])
    experts = torch.where((ids.flatten() == 2).unsqueeze(1), torch.tensor([0, 1]), torch.tensor([2, 3]))
    moe = MoE(8, 8, 4, 2)
    batch = SimpleNamespace(images=torch.zeros(2, 1), input_ids=ids, attention_mask=ids != 0, plans=None)

    class Model(torch.nn.Linear):
        def forward(self, *_: Any, plans: Any) -> Any:
            return SimpleNamespace(routings=[SimpleNamespace(experts=experts.int())])

    model: Any = Model(1, 1)
    model.tokens, model.layers = tokens, (3,)
    model.lm = SimpleNamespace(blocks=[SimpleNamespace(mlp=moe)])
    drawn: Any = SimpleNamespace(held_out=lambda number, size: batch)
    use = expert_use(model, drawn, 2)
    assert use == {"layers": [3], "image": [[0.5, 0.5, 0.0, 0.0]], "text": [[0.0, 0.0, 0.5, 0.5]]}


def test_a_run_through_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(moe_llava, "HELD_OUT", 4)
    monkeypatch.setattr(trainer, "HELD_OUT", 8)
    run = Run(model="moe_llava-tiny", steps=4, batch=2)
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    result = train(run, tmp_path / "run", save_every=1)
    assert list(result.held_out) == ["projector", "instructions", "experts"]
    use = result.held_out["experts"]["experts"]
    assert use["layers"] == [0, 2] and all(abs(sum(row) - 1) < 1e-6 for row in use["image"] + use["text"])
    assert "experts" not in result.held_out["instructions"]
    draw(tmp_path / "run")
    with Image.open(tmp_path / "run" / "experts.png") as picture:
        assert picture.format == "PNG" and picture.width > 300
    picture = Image.new("RGB", (40, 50), "navy")
    for step, kind in ((3, MLP), (4, MoE)):  # a checkpoint is of the stage that wrote it
        captioner = Captioner.from_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        assert isinstance(captioner.model.lm.blocks[0].mlp, kind)
        assert isinstance(captioner.caption([picture], "what is shown?", max_new_tokens=2), str)
    with pytest.raises(ValueError, match="video: got one for a model of pictures"):
        captioner.caption([picture], "", video=True)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_that_stops_at_the_experts_goes_on_with_the_same_bits(tmp_path, monkeypatch, stop):
    stages = models.config("moe_llava-tiny").stages
    monkeypatch.setattr(
        Run, "stages", lambda run: [(s, n) for s, n in zip(stages, (1, 1, 1, 3), strict=True)]
    )
    run = Run(model="moe_llava-tiny", steps=6, batch=2)
    whole = Trainer(run, tmp_path / "whole")
    for _ in range(6):
        if whole.step == stop:
            whole.out = tmp_path / "part"
            whole.save()
        whole.take_step()
    again = Trainer(run, tmp_path / "part")
    again.resume()
    assert again.step == stop
    while again.step < 6:
        again.take_step()
    state = dict(whole.model.named_parameters())
    assert all(torch.equal(p, state[n]) for n, p in again.model.named_parameters())
