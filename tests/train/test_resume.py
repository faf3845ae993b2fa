"""Kill -9 at any moment, start again: the curve, the weights and the folder are those of a run that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmkernels.data import store
from mmkernels.train import Run, Trainer, checkpoint, train
from mmkernels.train.log import Log, read

WORKER = Path(__file__).with_name("worker.py")
STEPS = 10


def start(folder, moment="never", count=0):
    patient = os.environ | {
        "OMP_WAIT_POLICY": "passive"
    }  # two threads that wait by spinning starve a busy machine
    return subprocess.Popen([sys.executable, WORKER, folder, str(STEPS), moment, str(count)], env=patient)


def curve(folder):
    """The log without its clock; floats are compared as they are written, bit for bit."""
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "speed")}
        for record in read(folder)
    ]


def content(folder):
    """Every file of the run but the log and the result, which tell the time."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {str(p): (folder / p).read_bytes() for p in paths if p.name not in ("log.jsonl", "result.json")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(folder).wait(300) == 0
    assert [record["step"] for record in curve(folder)] == list(range(1, STEPS + 1))
    return folder


def assert_same_run(folder, undisturbed):
    assert curve(folder) == curve(undisturbed)
    ours, theirs = content(folder), content(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_killed_again_and_again_the_curve_continues_bit_for_bit(tmp_path, undisturbed):
    """Before the first checkpoint, in the middle of saves, as a checkpoint gets its name, and between saves."""
    folder = tmp_path / "run"
    for moment, count in (("step", 1), ("fsync", 6), ("replace", 7), ("step", 3), ("fsync", 13)):
        assert start(folder, moment, count).wait(300) == -signal.SIGKILL, (moment, count)
    assert start(folder).wait(300) == 0
    assert_same_run(folder, undisturbed)


def test_killed_from_outside_at_some_moment(tmp_path, undisturbed):
    """The moment is the machine's: whenever the log has grown to a few lines."""
    folder = tmp_path / "run"
    worker = start(folder)
    while not (folder / "log.jsonl").is_file() or len((folder / "log.jsonl").read_bytes()) < 900:
        assert worker.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    assert len(curve(folder)) < STEPS
    assert start(folder).wait(300) == 0
    assert_same_run(folder, undisturbed)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted") / "run"

    def stop(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Run(steps=10, batch=1), out, save_every=2, observe=stop)
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A run of ten steps that stopped after five, with checkpoints at 2 and 4: a copy of its folder."""
    return shutil.copytree(interrupted, tmp_path / "run")


def resume(out):
    run = Trainer(Run(steps=10, batch=1), out)
    run.resume()
    return run


def test_a_checkpoint_holds_all_the_next_step_depends_on(stopped):
    assert resume(stopped).take_step()["losses"] == read(stopped)[4]["losses"]
    run = resume(stopped)
    assert run.step == 4
    moments = {run._names()[p]: state for p, state in run.optimizer.state.items()}
    assert moments
    assert all(
        state["step"] == 4 and state["exp_avg"].any()
        for name, state in moments.items()
        if "cross" not in name
    )


def test_the_log_forgets_what_no_checkpoint_remembers(stopped):
    with (stopped / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    assert [r["step"] for r in read(stopped)] == [1, 2, 3, 4, 5]
    log = Log(stopped, 4)
    log.append({"step": 5, "again": True})
    log.close()
    assert [r["step"] for r in read(stopped)] == [1, 2, 3, 4, 5]
    assert read(stopped)[-1] == {"step": 5, "again": True}


def test_a_damaged_log_is_named(stopped):
    (stopped / "log.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl: damaged"):
        read(stopped)


def test_other_threads_or_versions_warn(stopped):
    place = store.checkpoint(stopped, 4) / "checkpoint.json"
    state = json.loads(place.read_text())
    assert state["environment"]["threads"] == torch.get_num_threads()
    state["environment"] |= {"threads": 999, "torch": "0.0"}
    place.write_text(store.to_json(state))
    with pytest.warns(UserWarning, match="not bit for bit: threads was 999, is .*torch was 0.0"):
        resume(stopped)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "run.json"])
def test_one_flipped_bit_is_found_and_its_file_named(stopped, name):
    path = store.checkpoint(stopped, 4) / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}: damaged.*remove .*step-00000004 to continue from step 2"):
        resume(stopped)


def test_a_missing_file_is_named(stopped):
    (store.checkpoint(stopped, 4) / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: missing"):
        resume(stopped)


@pytest.mark.parametrize("text", ["", "{}", '{"step": "x", "sha256": {}}'])
def test_a_damaged_state_is_named(stopped, text):
    (store.checkpoint(stopped, 4) / "checkpoint.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint\.json: damaged"):
        resume(stopped)


@pytest.mark.parametrize(
    "broken", [(checkpoint, "save"), (checkpoint.weights, "save"), (os, "fsync"), (os, "replace")]
)
def test_a_save_that_fails_leaves_the_last_checkpoint_alone(stopped, monkeypatch, broken):
    run = resume(stopped)
    run.take_step()
    before = content(stopped)

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*broken, full)
        with pytest.raises(OSError, match="no space left"):
            run.save()
    assert content(stopped) == before
    assert run.save().name == "step-00000005"
    assert store.steps(stopped) == [4, 5]
