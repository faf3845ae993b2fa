"""From a checkpoint on disk to words: what is loaded is what was trained, and pictures stand where the prompt says."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels import models
from mmkernels.data import images, store
from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer


@pytest.fixture(scope="module")
def captioner(trained):
    return Captioner.from_checkpoint(trained)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def broken(trained, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(store.find_checkpoint(trained), tmp_path / "broken")


def test_the_model_is_the_trained_one(trained, captioner):
    run = Trainer(Run(steps=2, batch=1), trained)
    run.resume()
    theirs = dict(run.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in captioner.model.named_parameters())
    assert captioner.tokenizer.text() == run.tokenizer.text()
    assert not any(p.requires_grad for p in captioner.model.parameters())


def test_a_caption_is_what_the_model_generates(captioner, pictures, monkeypatch):
    given = {}

    def generate(pixels, ids, mask, *, max_new_tokens):
        given.update(pixels=pixels, ids=ids, length=max_new_tokens)
        return torch.tensor([[*captioner.tokenizer.encode(" a cat"), 3, 0]])

    monkeypatch.setattr(captioner.model, "generate", generate)
    assert captioner.caption(pictures, "a photograph of", max_new_tokens=6) == "a cat"
    expected = images.normalise(np.stack([images.square(images.load(p), 32) for p in pictures]))
    assert torch.equal(given["pixels"], expected.unsqueeze(0))
    assert given["ids"].tolist() == [[2, 2, 2, *captioner.tokenizer.encode("a photograph of")]]
    assert given["length"] == 6


def test_opened_pictures_serve_as_well_as_paths(captioner, pictures):
    opened = [Image.open(p) for p in pictures]
    assert (
        captioner.caption(opened)
        == captioner.caption([str(p) for p in pictures])
        == captioner.caption(pictures)
    )


def test_pictures_stand_before_the_prompt_or_where_it_says(captioner):
    assert captioner._text(2, " a photograph of ") == "<image><image>a photograph of"
    assert captioner._text(2, "<image>a cat<|endofchunk|><image>") == "<image>a cat<|endofchunk|><image>"
    for prompt in ("<image>", "<image><image><image>"):
        with pytest.raises(ValueError, match=rf"prompt: got {prompt.count('<')} <image> for 2 pictures"):
            captioner._text(2, prompt)
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"pictures: got {count}, expected 1 to 6"):
            captioner._text(count, "")


def test_a_picture_that_cannot_be_read_is_named(captioner, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(images.ImageError, match=r"bad\.png"):
        captioner.caption([pictures[0], tmp_path / "bad.png"])


def test_the_answer_is_no_longer_than_asked(captioner, pictures):
    ids = captioner.tokenizer.encode(captioner.caption(pictures[:1], max_new_tokens=1))
    assert len(ids) <= 1
    with pytest.raises(ValueError, match="max_new_tokens: got 0"):
        captioner.caption(pictures[:1], max_new_tokens=0)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "run.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_damaged_checkpoints_name_the_file(broken, name, damage):
    path = broken / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": raw[: len(raw) // 2], "garbage": b"\xff" * 100}[damage])
    with pytest.raises((ValueError, FileNotFoundError), match=name if path.exists() else "broken"):
        Captioner.from_checkpoint(broken)


def test_a_pickle_is_refused_and_never_run(broken, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: a pickle, which can run code"):
        Captioner.from_checkpoint(broken)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_shape_are_refused(broken):
    state = models.build("flamingo-tiny").state_dict()
    state["lm.norm.weight"] = state["lm.norm.weight"][:5]
    models.weights.save(state, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm\.norm\.weight has shape \[5\]"):
        Captioner.from_checkpoint(broken)


def test_a_checkpoint_of_an_unknown_model_is_refused(broken):
    (broken / "run.json").write_text('{"model": "flamingo-tinny"}')
    with pytest.raises(ValueError, match="did you mean 'flamingo-tiny'"):
        Captioner.from_checkpoint(broken)
    (broken / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json: damaged, it names no model"):
        Captioner.from_checkpoint(broken)
