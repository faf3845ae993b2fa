"""`--data stamps` on a folder of the shape that the Debian package has, and what is said where it is not installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmkernels import data
from mmkernels.cli.main import main
from mmkernels.data import stamps
from mmkernels.train import Run, Trainer, qformer, trainer

CAPTIONS = ("A dragonfly.", "A fireman.", "A slice of bread.", "An orange cat", "Twelve 10-yen coins")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    rng, root = np.random.default_rng(0), tmp_path / "stamps"
    for i, caption in enumerate(CAPTIONS):
        folder = root / ("animals" if i % 2 else "people")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 60, 4), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}\nde.utf8=Etwas\n", encoding="utf-8")
    monkeypatch.setitem(data._BUILDERS, "stamps", lambda: stamps.build(root))
    data.build.cache_clear()
    yield
    data.build.cache_clear()


@pytest.fixture
def short(monkeypatch):
    for module, name, value in (
        (trainer, "HELD_OUT", 2), (qformer, "PICTURES", 6), (qformer, "TOP", 2), (qformer, "SHOWN", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("installed", "short")
def test_blip2_learns_from_stamps(tmp_path, capsys):
    words = ("train", "--model", "blip2-tiny", "--data", "stamps", "--out", tmp_path / "run", "--steps", 3)
    assert main([*map(str, words), "--batch", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["held_out"]) == {"stage1", "stage2"}
    known = {caption.rstrip(".").lower() for caption in CAPTIONS}
    assert {true for true, _ in result["held_out"]["stage2"]["captions"]} <= known


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["qwen_vl-tiny", "llama-vid-tiny", "flamingo-tiny", "blip2-t5-tiny"])
def test_others_take_steps_on_stamps(tmp_path, name):
    run = Trainer(Run(model=name, data="stamps", steps=2, batch=1), tmp_path / "run")
    run.take_step()
    assert run.sequences.dataset.name == "stamps"


def test_many_words_leave_room_for_a_model_s_marks(tmp_path, monkeypatch):
    """Qwen-VL's tiny vocabulary keeps its last ids for images and turns: text gets those before them."""
    rng = np.random.default_rng(0)
    picture = data.dataset.Picture(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), 0)
    words = tuple(" ".join(map(str, row)) for row in rng.integers(10**6, size=(300, 4)))
    pictures = tuple((picture,) for _ in words)
    many = data.Dataset("many", words, pictures, pictures)
    monkeypatch.setitem(data._BUILDERS, "many", lambda: many)
    for name, most in (("qwen_vl-tiny", 507), ("blip2-tiny", 512)):
        run = Trainer(Run(model=name, data="many", steps=4, batch=1), tmp_path / name)
        assert len(run.tokenizer) == most


def test_what_is_not_installed_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    data.build.cache_clear()
    monkeypatch.setitem(data._BUILDERS, "stamps", lambda: stamps.build(tmp_path / "nowhere"))
    words = ("train", "--model", "blip2-tiny", "--data", "stamps", "--out", str(tmp_path / "run"))
    assert main(list(words)) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("mmkernels train: --data stamps reads ")
    assert said[0].endswith("which is not there: apt-get install tuxpaint-stamps-default")
    assert not (tmp_path / "run").exists()
