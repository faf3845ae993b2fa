"""Every recipe is what its preset says, and its tiny model goes through the first change of stages: what is frozen stays bit
for bit, what is trained moves, and it writes.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkernels import models
from mmkernels.cli.main import main
from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer
from mmkernels.train.recipes import RECIPES, Mix, recipe

HERE = {name: found for name, found in RECIPES.items() if "trains" in found.stands()}
TINY = sorted({found.tiny for found in HERE.values()})


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_there_are_21_systems():
    assert len(RECIPES) == 21 and len({found.system for found in RECIPES.values()}) == 21


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_speaks_of_its_presets_stages_and_of_a_test_that_is_there(name):
    found = RECIPES[name]
    assert found.preset in models.list()
    stages = {stage["name"] for stage in found.describe()["stages"]}
    assert set(found.data) <= stages, stages
    assert not found.parity or (Path(__file__).parents[2] / found.parity).is_file()
    assert (
        {"trains", "generates"} <= set(found.stands()) or found.tiny not in models.list() or name not in HERE
    )


@pytest.mark.parametrize("tiny", TINY)
def test_the_first_change_of_stages(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    run = Trainer(Run(model=tiny, batch=1), tmp_path / "run")
    if len(run.stages) > 1:
        run.take_step()
    stage = run.stages[-1 if len(run.stages) == 1 else 1][0]
    # what happens to the model between two stages is not the step's doing
    run._enter(run.stage_at(run.step))
    run.objectives.begin(stage)
    monkeypatch.setattr(run.objectives, "begin", lambda stage: None)
    run.index = run.stage_at(run.step)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.take_step()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    learns = {name for name in before if any(fnmatchcase(name, pattern) for pattern in stage.trainable)}
    assert moved <= learns and len(moved) > len(learns) / 4
    for pattern in stage.trainable:
        assert any(fnmatchcase(name, pattern) for name in learns)
    captioner = Captioner(run.model, run.tokenizer, _side(run.model.config))
    written = captioner.caption([Image.new("RGB", (40, 50), "navy")], "what is shown?", max_new_tokens=2)
    assert isinstance(written, str)


def _side(config: Any) -> int:
    return config.vision.image_size if hasattr(config, "vision") else config.canvas[0]


def test_mixes():
    assert Mix({"a": 4, "b": 1}, by="square_root").odds == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert RECIPES["flamingo"].data["joints"].sets == {"m3w": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03}
    assert RECIPES["flamingo"].data["joints"].odds == dict.fromkeys(("m3w", "align", "ltip", "vtp"), 0.25)
    assert RECIPES["yi_vl"].data["instruct"].cap == 50_000
    for choices, match in (
        ({"sets": {"a": 0.5}, "by": "shares"}, r"add up to 0\.5, expected 1"), ({"sets": {}}, "ratios: got {}"),
        ({"sets": {"a": 1}, "by": "luck"}, "by: got 'luck'"), ({"sets": {"a": 1}, "cap": 0}, "cap: got 0"),
        ({"sets": {"a": -1.0}, "by": "losses"}, "'a': -1.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Mix(**choices)


def test_unknown_recipes_and_two_choices_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="recipe: got 'flamngo', no such recipe; did you mean 'flamingo'"):
        recipe("flamngo")
    assert main(["train", "--recipe", "flamingo", "--model", "lavin-tiny", "--out", str(tmp_path / "x")]) == 2
    assert "expected one of them" in capsys.readouterr().err
    assert main(["train", "--recipe", "nothing", "--out", str(tmp_path / "x")]) == 2


def test_a_recipe_is_printed_whole(capsys):
    assert main(["models", "--recipe", "next_gpt"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "NExT-GPT",
        "stage      decoding",
        "out.*, lm.embedding.*",
        "0.0002",
        "stands     trains, generates, parity",
    ):
        assert words in printed
