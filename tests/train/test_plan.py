"""Plans: the work is what a model's products are, memory what autograd holds, and the arithmetic what the page says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mmkernels import models
from mmkernels.cli.main import main
from mmkernels.primitives._op import OPS
from mmkernels.train.flops import FORWARD, FREE, Work, count
from mmkernels.train.plan import GPUS, Wish, document, plan, predict

TINY = (
    "flamingo-tiny",
    "blip2-tiny",
    "cogvlm-tiny",
    "lavin-tiny",
    "llava-1.5-tiny",
    "moe_llava-tiny",
    "qwen_vl-tiny",
)


def _model(name: str, device: str) -> Any:
    with torch.device(device):
        return models.build(name).train()


def test_every_op_says_what_it_computes():
    assert {name.removesuffix("_backward") for name in OPS} == set(FORWARD) | FREE


def test_a_language_model_s_work_is_its_weights_times_its_tokens():
    """Two FLOPs a weight and token, three times that with gradients, and attention's two products of every pair."""
    model = _model("llava-1.5-tiny", "meta")
    model.requires_grad_(True)
    ids = torch.full((1, 40), 7, device="meta")
    found = count(model, {"input_ids": ids, "labels": ids, "images": None})
    c = model.config.lm
    weights = sum(
        p.numel() for name, p in model.lm.named_parameters() if p.dim() == 2 and "embedding" not in name
    )
    weights += c.vocab * c.block.width if c.tied else 0
    attention = c.layers * 4 * 40 * 40 * c.block.heads * (c.block.head_dim or c.block.width // c.block.heads)
    # in training a text without pictures reads a black one, so that every rank has the same graph
    black = count(model, {"input_ids": ids[:, :1], "labels": ids[:, :1], "images": None})
    one = 2 * weights + attention / 1600
    assert found.forward - black.forward == pytest.approx(2 * weights * 40 + attention - one, rel=1e-9)
    assert 2.5 * found.forward < found.total < 3.5 * found.forward


@pytest.mark.parametrize("name", TINY)
def test_a_stage_that_trains_less_computes_less_and_keeps_less(name):
    model = _model(name, "meta")
    works = []
    for train in (False, True):
        model.requires_grad_(train)
        if not train:
            model.stages()[-1].freeze(model)
        works.append(count(model, document(model, model.stages()[-1], 1, 24)))
    some, all_of_it = works
    assert some.forward <= all_of_it.forward * 1.001
    assert some.total <= all_of_it.total * 1.001 and 0 < some.kept <= all_of_it.kept * 1.001


def test_what_is_kept_is_what_autograd_holds():
    """On the CPU: the tensors that a real forward pass saves, counted by their own storages."""
    name, held = "flamingo-tiny", {}
    planned, real = _model(name, "meta"), _model(name, "cpu")
    stage = planned.stages()[-1]
    for model in (planned, real):
        stage.freeze(model)
    batch = document(planned, stage, 2, 30)
    expected = count(planned.bfloat16().float(), {**batch, "images": batch["images"].float()}).kept
    ids = torch.full((1, 32), 9)
    ids[:, :2] = real.tokens.image
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        real(torch.randn(1, 2, 3, 32, 32), ids, labels=ids)
    assert sum(size for size, _ in held.values()) == pytest.approx(expected, rel=0.1)


def test_the_arithmetic_of_a_step():
    wish = Wish("flamingo-3b", gpus=16, gpu="h100", batch=4, efficiency=0.4)
    found = predict(wish, Work(1e12, 3e12, 2e9), ("joints", 500, 3 * 10**9, 10**9))
    machine = GPUS["h100"]
    assert found.compute_seconds == pytest.approx(12e12 / (0.4 * machine.flops))
    assert found.wire_bytes == pytest.approx(15 / 16 * (12e9 + 4e9))
    assert found.wire_seconds == pytest.approx(15e9 / machine.network)  # more GPUs than a node has
    assert found.step_seconds == max(found.compute_seconds, found.wire_seconds)
    assert found.tokens_per_second == pytest.approx(16 * 4 * 500 / found.step_seconds)
    assert found.state_bytes == pytest.approx((6e9 + 16e9) / 16 + 2 * 6e9 / 32)
    assert found.activation_bytes == 8e9 and found.fits
    assert not predict(wish, Work(1e12, 3e12, 3e10), ("joints", 500, 3 * 10**9, 10**9)).fits


def test_one_gpu_sends_nothing():
    found = plan(Wish("flamingo-tiny", gpus=1, words=16))
    assert found.wire_bytes == 0 and found.step_seconds == found.compute_seconds
    assert found.parameters == sum(p.numel() for p in _model("flamingo-tiny", "meta").parameters())


def test_by_command_line(capsys):
    assert main(["plan", "--model", "llava-1.5-tiny", "--words", "20", "--gpus", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gpus"] == 4 and told["fits"] and told["step_seconds"] > 0
    assert main(["plan", "--model", "llava-1.5-tiny", "--words", "20"]) == 0
    assert "tokens a second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "llava-1.5-tinny"), "did you mean 'llava-1.5-tiny'"),
        (("--model", "flamingo-tiny", "--gpus", "0"), "gpus: got 0"),
        (("--model", "flamingo-tiny", "--gpu", "v100"), "gpu: got 'v100'"),
        (("--model", "flamingo-tiny", "--stage", "last"), "stage: got 'last', expected one of towers"),
        (("--model", "flamingo-tiny", "--efficiency", "1.5"), "efficiency: got 1.5"),
        (("--model", "fuyu-tiny"), "pictures of any size"),
    ],
)
def test_what_cannot_be_planned_is_said(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
