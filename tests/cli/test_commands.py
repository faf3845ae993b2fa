"""The commands do what they say, and bad input ends in one clear sentence, a status that is not 0, and nothing written."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmkernels.cli.main import main
from mmkernels.train import trainer


@pytest.fixture
def run(capsys):
    """Runs a command in this process; gives its status, output and errors."""

    def call(*words):
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's own
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must fail with one sentence on standard error."""

    def call(*words):
        status, out, err = run(*words)
        assert status not in (0, None)
        assert out == ""
        assert "Traceback" not in err
        sentences = [line for line in err.splitlines() if line.startswith("mmkernels")]
        assert len(sentences) == 1, err
        return sentences[0]

    return call


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    return tmp_path / "a.png"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(trainer, "HELD_OUT", 2)
    return ("--steps", 3, "--batch", 1)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_models_lists_every_preset(run):
    _, out, _ = run("models", "--json")
    found = {row["name"]: row for row in json.loads(out)["models"]}
    assert {"flamingo-3b", "flamingo-4b", "flamingo-9b", "otter-9b", "flamingo-tiny"} <= set(found)
    assert found["flamingo-tiny"]["stages"] == ["towers", "joints"]
    assert 1e6 < found["flamingo-tiny"]["parameters"] < 3e6
    status, out, _ = run("models")
    assert status == 0
    assert "flamingo-9b" in out


def test_train_then_generate(run, short, tmp_path, picture):
    out = tmp_path / "run"
    status, text, err = run("train", "--out", out, *short)
    assert status == 0, err
    assert "held-out last-image accuracy" in text
    assert "with the pictures shuffled" in text
    assert "step 3 of 3" in err  # no bar where there is no terminal
    assert "\x1b" not in text + err
    assert (out / "loss.png").is_file()
    status, text, _ = run("train", "--out", out, *short, "--json")
    result = json.loads(text)
    assert status == 0
    assert result["steps"] == 3
    status, text, _ = run("generate", "--checkpoint", out, "--image", picture, "--image", picture, "--json")
    answer = json.loads(text)
    assert answer["images"] == [str(picture)] * 2
    _, words, _ = run(
        "generate", "--checkpoint", result["checkpoint"], "--image", picture, "--image", picture
    )
    assert words.strip() == answer["caption"]


def test_threads_and_kernels_are_chosen(run, short, tmp_path):
    before = torch.get_num_threads()
    try:
        status, _, err = run(
            "train", "--out", tmp_path / "run", *short, "--threads", 1, "--backend", "reference"
        )
        assert status == 0, err
        state = json.loads((tmp_path / "run/checkpoints/step-00000003/checkpoint.json").read_text())
        assert state["environment"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--model", "flamingo-tinny"), "no such model; did you mean 'flamingo-tiny'"),
        (("--model", "flamingo-9b"), "starts from published weights"),
        (("--data", "digit"), "did you mean 'digits'"),
        (("--steps", 0), "steps: got 0, expected 1 or more"),
        (("--batch", -1), "batch: got -1"),
        (("--seed", -1), "seed: got -1"),
        (("--threads", 0), "threads: got 0"),
        (("--save-every", 0), "save-every: got 0"),
        (("--precision", "int8"), "precision: got 'int8'"),
        (("--resume", "maybe"), "resume: got 'maybe'"),
        (("--device", "tpu"), "device: got 'tpu'"),
    ],
)
def test_bad_choices_write_nothing(refused, tmp_path, words, why):
    assert why in refused("train", "--out", tmp_path / "run", *words)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "words", [(), ("--out", "x", "--steps", "many"), ("--out", "x", "--backend", "fortran")]
)
def test_unusable_words_are_refused_by_the_parser(run, words):
    status, out, err = run("train", *words)
    assert status == 2
    assert out == ""
    assert "mmkernels train: error:" in err


def test_missing_data_writes_nothing(refused, tmp_path, monkeypatch):
    from mmkernels import data

    monkeypatch.setitem(data._BUILDERS, "stamps", lambda: data.stamps.build(tmp_path / "none"))
    assert "apt-get install tuxpaint-stamps-default" in refused(
        "train", "--data", "stamps", "--out", tmp_path / "run"
    )
    assert tree(tmp_path) == {}


def test_a_folder_of_another_run_stays_as_it_is(refused, short, trained, tmp_path):
    before = tree(trained)
    assert "belongs to another run (steps 2, not 3)" in refused("train", "--out", trained, *short)
    same = ("--steps", 2, "--batch", 1)
    assert "already holds this run" in refused("train", "--out", trained, *same, "--resume", "never")
    assert "seed 0, not 4" in refused("train", "--out", trained, *same, "--seed", 4)
    assert tree(trained) == before
    (tmp_path / "letters").write_text("to grandmother")
    assert "holds files that are no run's" in refused("train", "--out", tmp_path, *short)
    assert "a file, expected a folder" in refused("train", "--out", tmp_path / "letters", *short)
    assert tree(tmp_path) == {"letters": b"to grandmother"}


def test_a_diverged_run_ends_in_a_sentence(refused, short, tmp_path, monkeypatch):
    loss = trainer.Objectives.loss
    monkeypatch.setattr(trainer.Objectives, "loss", lambda *a: loss(*a) * (float("nan") if a[2] == 2 else 1))
    sentence = refused("train", "--out", tmp_path / "run", *short, "--save-every", 1)
    assert "step 3: the losses are" in sentence
    assert "the last good checkpoint is" in sentence
    assert "step-00000002" in sentence


def huge(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8000, 8000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(8000 * 1001)))
        + chunk(b"IEND", b"")
    )


def test_pictures_that_cannot_be_captioned(refused, trained, picture, tmp_path):
    def generate(*words):
        return refused("generate", "--checkpoint", trained, *words)

    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "text.png").write_text("not a picture")
    huge(tmp_path / "huge.png")
    assert "none.png: no such picture" in generate("--image", tmp_path / "none.png")
    assert "cut.png: damaged" in generate("--image", picture, "--image", tmp_path / "cut.png")
    assert "text.png: not a picture" in generate("--image", tmp_path / "text.png")
    assert "huge.png: 8000 x 8000 pixels is more than" in generate("--image", tmp_path / "huge.png")
    assert "2 <image> for 1 pictures" in generate("--image", picture, "--prompt", "<image><image>")
    assert "model: got 'blip2-tiny' for" in generate("--image", picture, "--model", "blip2-tiny")
    assert "pictures: got 7, expected 1 to 6" in generate(*["--image", picture] * 7)
    assert "stream: got it beside beams" in generate("--image", picture, "--stream", "--beams", 2)
    assert "beams: got 2 beside a temperature" in generate(
        "--image", picture, "--beams", 2, "--temperature", 1
    )
    assert "max_new_tokens: got 0" in generate("--image", picture, "--max-new-tokens", 0)


def test_checkpoints_that_cannot_be_read(refused, picture, tmp_path):
    def generate(checkpoint):
        return refused("generate", "--checkpoint", checkpoint, "--image", picture)

    assert "none: no such checkpoint" in generate(tmp_path / "none")
    assert "a file, expected the folder" in generate(picture)
    (tmp_path / "empty").mkdir()
    assert "empty: holds no checkpoint" in generate(tmp_path / "empty")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/run.json").write_text('{"model": "flamingo-tiny"}')
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle/model.safetensors")
    assert "a pickle, which can run code" in generate(tmp_path / "pickle")


def test_convert(run, refused, tmp_path):
    torch.save({"model_state_dict": {"module.w": torch.arange(3.0)}}, tmp_path / "a.pt")
    status, out, _ = run("convert", tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert status == 0
    assert "1 tensors" in out
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.arange(3.0))
    before = tree(tmp_path)
    assert "no such file" in refused("convert", tmp_path / "none.pt", tmp_path / "b.safetensors")
    assert "ends in .safetensors" in refused("convert", tmp_path / "a.pt", tmp_path / "b.bin")
    assert "no such folder" in refused("convert", tmp_path / "a.pt", tmp_path / "none/b.safetensors")
    assert tree(tmp_path) == before


def test_converting_a_hostile_pickle_runs_nothing(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    before = tree(tmp_path)
    assert "cannot be converted" in refused("convert", tmp_path / "evil.pt", tmp_path / "b.safetensors")
    assert tree(tmp_path) == before


def test_the_installed_command_is_this_one():
    done = subprocess.run(
        [sys.executable, "-m", "mmkernels.cli.main", "train"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the following arguments are required: --out" in done.stderr
