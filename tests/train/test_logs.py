"""What a run writes beside its losses: its speed, and the same for TensorBoard; and a run that keeps less."""

from __future__ import annotations

import json

import pytest
import torch

from mmkernels.train import Run, train, trainer
from mmkernels.train.throughput import Throughput


@pytest.fixture(autouse=True)
def _few_documents(monkeypatch):
    monkeypatch.setattr(trainer, "HELD_OUT", 2)


def _records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_every_step_tells_its_speed(tmp_path):
    train(Run(steps=3, batch=1), tmp_path / "run")
    records = _records(tmp_path / "run")
    assert len(records) == 3
    for record in records:
        speed = record["speed"]
        assert record["tokens"] > 0 and speed["gflops_per_second"] > 0 and "mfu" not in speed
        assert speed["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"], rel=0.05)


def test_a_known_gpu_has_an_mfu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = Throughput(torch.nn.Linear(2, 2), "cuda")
    found.flops, found.tokens = 989e12, 7
    speed = {"tokens_per_second": 3.5, "gflops_per_second": 494500.0, "mfu": 0.5}
    assert found.record(2.0) == {"tokens": 7, "speed": speed}


def test_tensorboard_reads_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Run(steps=3, batch=1), tmp_path / "run", tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    records = _records(tmp_path / "run")
    found = {event.step: event.value for event in board.Scalars("loss")}
    assert found == pytest.approx({record["step"]: record["loss"] for record in records})
    assert {name for record in records for name in record["losses"]} == {
        tag.removeprefix("losses/") for tag in board.Tags()["scalars"] if tag.startswith("losses/")
    }


def test_a_run_that_keeps_less_is_the_same_run(tmp_path):
    runs = [train(Run(steps=3, batch=1), tmp_path / str(n), recompute=n == 1) for n in range(2)]
    one, two = (_records(tmp_path / str(n)) for n in range(2))
    assert [r["losses"] for r in one] == [r["losses"] for r in two]
    assert runs[0].accuracy == runs[1].accuracy
    with pytest.raises(ValueError, match="recompute: got it for blip2-t5-tiny"):
        train(Run("blip2-t5-tiny", steps=2, batch=2), tmp_path / "t5", recompute=True)
