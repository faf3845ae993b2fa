"""Files are whole or not there, whatever interrupts their writing."""

from __future__ import annotations

import os

import pytest

from mmkernels.data import store


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_replaces_in_one_step(tmp_path, monkeypatch):
    store.write(tmp_path / "a.json", "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    place = store.checkpoint(tmp_path, 7)
    with pytest.raises(FileNotFoundError), store.new_folder(place) as folder:
        (folder / "none").read_text((folder / "half").write_text("x") and None)
    assert store.steps(tmp_path) == []
    assert names(place.parent) == []
    with store.new_folder(place) as folder:
        (folder / "whole").write_text("x")
        assert store.steps(tmp_path) == []
    assert store.steps(tmp_path) == [7]
    assert names(place) == ["whole"]


def test_tidy_keeps_the_latest_and_clears_what_a_killed_run_left(tmp_path):
    for step in (1, 5, 20):
        with store.new_folder(store.checkpoint(tmp_path, step)) as folder:
            (folder / "x").write_text("x")
    (tmp_path / "checkpoints" / ".unfinished-abc").mkdir()
    (tmp_path / "checkpoints" / ".unfinished-abc" / "half").write_text("x")
    (tmp_path / ".unfinished-log").write_text("x")
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    store.tidy(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoints"]
    assert names(tmp_path / "checkpoints") == ["step-00000005", "step-00000020", "step-notes"]


def test_find_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        store.find_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        store.find_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a file, expected the folder"):
        store.find_checkpoint(tmp_path / "file")
    for step in (3, 12):
        with store.new_folder(store.checkpoint(tmp_path, step)) as folder:
            (folder / "model.safetensors").write_text("x")
    latest = store.find_checkpoint(tmp_path)
    assert latest.name == "step-00000012"
    assert store.find_checkpoint(latest) == latest


@pytest.mark.parametrize(("text", "why"), [("", "not JSON"), ("[1]", "got a JSON list"), ("{", "not JSON")])
def test_damaged_json_is_named(tmp_path, text, why):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: .*{why}"):
        store.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"b\.json"):
        store.read_json(tmp_path / "b.json")


def test_a_second_writer_is_kept_out(tmp_path):
    """A lock belongs to the opened folder, so one process can play both."""
    with (
        store.locked(tmp_path),
        pytest.raises(ValueError, match="another process is writing here"),
        store.locked(tmp_path),
    ):
        pass
    with store.locked(tmp_path):
        pass
