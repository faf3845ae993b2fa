"""What a step does: it learns what the stage trains, leaves the rest alone, and says so."""

from __future__ import annotations

import json
import math

import pytest
import torch

import mmkernels
from mmkernels import models
from mmkernels.train import Diverged, Run, Trainer, curve, train, trainer
from mmkernels.train import config as run_config
from mmkernels.train.log import read
from mmkernels.train.schedule import learning_rate


@pytest.fixture
def fresh(tmp_path):
    def make(**choices) -> Trainer:
        return Trainer(Run(**{"steps": 10, "batch": 2, **choices}), tmp_path / "run")

    return make


def steps(trainer, count):
    return [trainer.take_step() for _ in range(count)]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def changed(trainer, before):
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


def test_a_short_run_learns_in_both_stages(fresh):
    run = fresh(steps=36, batch=4)
    towers = run.stages[0][1]
    first, *_, last = steps(run, towers)
    assert last["stage"] == "towers"
    assert last["losses"]["text"] < 0.6 * first["losses"]["text"]
    before = [run.objectives.loss("interleaved", n, run.stages[1][0]).item() for n in range(10**6, 10**6 + 3)]
    joints = steps(run, 36 - towers)
    assert {r["stage"] for r in joints} == {"joints"}
    after = [run.objectives.loss("interleaved", n, run.stages[1][0]).item() for n in range(10**6, 10**6 + 3)]
    assert sum(after) < 0.9 * sum(before)


def test_each_stage_trains_its_parameters_and_no_other(fresh):
    run = fresh()
    names = {name for name, _ in run.model.named_parameters()}
    towers = {name for name in names if name.startswith(("vision.", "lm."))}
    before = parameters(run)
    steps(run, run.stages[0][1])
    assert changed(run, before) == towers
    before = parameters(run)
    steps(run, 10 - run.stages[0][1])
    assert changed(run, before) == names - towers | {"lm.special_rows"}


def test_weight_decay_is_on_gated_blocks_only(fresh):
    run = fresh()
    steps(run, run.stages[0][1] + 1)
    decayed = {
        run._names()[p]: group["weight_decay"]
        for group in run.optimizer.param_groups
        for p in group["params"]
    }
    assert {name for name, decay in decayed.items() if decay} == {
        n for n in decayed if n.startswith("cross.")
    }
    assert {decay for decay in decayed.values() if decay} == {0.1}


def test_a_step_weighs_the_losses_of_its_two_batches(fresh):
    run = fresh()
    record = steps(run, run.stages[0][1] + 1)[-1]
    losses = record["losses"]
    assert record["loss"] == pytest.approx(0.2 * losses["pairs"] + 1.0 * losses["interleaved"], rel=1e-12)
    run.optimizer.zero_grad()
    stage, (name, weight) = run.stage, ("pairs", 0.2)
    (weight * run.objectives.loss(name, 3, stage)).backward()
    (1.0 * run.objectives.loss("interleaved", 3, stage)).backward()
    accumulated = run.model.cross[0].q.weight.grad.clone()
    run.optimizer.zero_grad()
    (0.2 * run.objectives.loss("pairs", 3, stage) + run.objectives.loss("interleaved", 3, stage)).backward()
    torch.testing.assert_close(run.model.cross[0].q.weight.grad, accumulated)


def test_batches_follow_the_mix(fresh):
    run = fresh(batch=3)
    sizes = []
    draw = run.sequences.pairs
    run.sequences.pairs = lambda number, size: sizes.append(size) or draw(number, size)
    run.objectives.loss("pairs", 0, run.stages[1][0])
    assert sizes == [6]  # twice as many pairs as documents, as published


def test_gradients_are_clipped_before_the_step(fresh, monkeypatch):
    run = fresh()
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, limit: norms.append(limit) or clip(p, limit)
    )
    record = run.take_step()
    assert norms == [1.0]
    assert record["norm"] > 1.0  # there was something to clip


def test_a_seed_gives_the_same_bits_and_another_seed_others(fresh):
    first, again, other = (steps(fresh(seed=seed), 3) for seed in (0, 0, 1))
    assert [r["losses"] for r in first] == [r["losses"] for r in again]
    assert [r["losses"] for r in first] != [r["losses"] for r in other]


def test_kernels_and_reference_learn_alike(fresh):
    ours = steps(fresh(), 10)
    with mmkernels.using("reference"):
        law = steps(fresh(), 10)
    for a, b in zip(ours, law, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_bfloat16_follows_float32(fresh):
    wide, narrow = steps(fresh(), 10), steps(fresh(precision="bfloat16"), 10)
    for a, b in zip(wide, narrow, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
    assert wide[-1]["loss"] != narrow[-1]["loss"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(tmp_path, monkeypatch, poison):
    out, loss = tmp_path / "run", trainer.Objectives.loss

    def poisoned(self, name, number, stage):
        value = loss(self, name, number, stage)
        bad = value * math.nan if poison == "loss" else value + (value - value.detach()) * math.inf
        return bad if number == 5 else value

    monkeypatch.setattr(trainer.Objectives, "loss", poisoned)
    with pytest.raises(Diverged, match=r"step 6: .*nan.*last good checkpoint is .*step-00000004"):
        train(Run(steps=10, batch=1), out, save_every=2)
    assert [r["step"] for r in read(out)] == [1, 2, 3, 4, 5]
    assert not (out / "result.json").exists()


def test_a_finished_run_reports_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "HELD_OUT", 8)
    seen, out = [], tmp_path / "run"
    result = train(Run(steps=4, batch=1), out, save_every=3, observe=seen.append)
    assert [r["step"] for r in seen] == [1, 2, 3, 4]
    assert seen == read(out)
    assert result.steps == 4
    assert result.loss == seen[-1]["loss"]
    assert result.documents == 8
    assert result.chance == 1 / 20
    assert json.loads((out / "result.json").read_text())["accuracy"] == result.accuracy
    assert curve.draw(out).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    again = train(Run(steps=4, batch=1), out, observe=lambda _: pytest.fail("there is nothing left to train"))
    assert (again.accuracy, again.loss) == (result.accuracy, result.loss)


def test_schedules():
    stage = models.config("flamingo-tiny").stages[0]
    rates = [learning_rate(stage, step, 100) for step in range(100)]
    warm = round(stage.warmup * 100)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[0] == pytest.approx(stage.learning_rate / warm)
    assert max(rates) == pytest.approx(stage.learning_rate)
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert rates[-1] < 0.01 * stage.learning_rate
    published = models.config("flamingo-3b").stages[0]
    assert [learning_rate(published, s, 10**6) for s in (0, 1874, 999_999)] == pytest.approx(
        [1e-4 / 1875, 1e-4, 1e-4]
    )


def test_steps_are_shared_in_the_recipes_proportions():
    recipe = [stage.steps for stage in models.config("flamingo-tiny").stages]
    assert [n for _, n in Run().stages()] == recipe
    assert [n for _, n in Run(steps=2 * sum(recipe)).stages()] == [2 * n for n in recipe]
    assert sum(n for _, n in Run(steps=7).stages()) == 7


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"model": "flamingo-tyni"}, "did you mean 'flamingo-tiny'"),
        ({"model": "llama-vid-tiny"}, "knows other families; train one of: flamingo-tiny"),
        ({"model": "flamingo-3b"}, "published weights.*train one of: flamingo-tiny"),
        ({"steps": 0}, "steps: got 0"),
        ({"batch": 0}, "batch: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"precision": "int8"}, "precision: got 'int8'"),
    ],
)
def test_impossible_runs_are_refused(choices, why):
    with pytest.raises(ValueError, match=why):
        Run(**choices)


def test_a_folder_belongs_to_one_run(tmp_path):
    out = tmp_path / "run"
    run_config.check_folder(Run(), out, "auto")
    run_config.claim(Run(), out)
    run_config.check_folder(Run(), out, "auto")
    with pytest.raises(ValueError, match="already holds this run"):
        run_config.check_folder(Run(), out, "never")
    with pytest.raises(ValueError, match=r"another run \(batch 16, not 8; seed 0, not 3\)"):
        run_config.check_folder(Run(batch=8, seed=3), out, "auto")
    with pytest.raises(ValueError, match="resume: got 'maybe'"):
        run_config.check_folder(Run(), out, "maybe")
    with pytest.raises(ValueError, match="holds files that are no run's"):
        run_config.check_folder(Run(), tmp_path, "auto")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a file, expected a folder"):
        run_config.check_folder(Run(), tmp_path / "file", "auto")
