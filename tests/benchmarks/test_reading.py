"""The reading benchmark: its record and picture are complete, pages have the sizes it names, slices are what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import reading
from mmkernels import models
from mmkernels.train import Run, llava, train, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "next"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava, "HELD_OUT", 2)
        patch.setattr(trainer, "HELD_OUT", 2)
        patch.setattr(Run, "stages", lambda run: [(models.config(run.model).stages[-1], 1)])
        train(Run(model="llava-next-tiny", steps=1, batch=2), out)
    return out


def test_a_run_writes_its_record_and_its_picture(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "SIZES", ((32, 32), (64, 32)))
    monkeypatch.setattr("sys.argv", ["reading", "--run", str(run), "--pages", "2", "--out", str(tmp_path)])
    reading.main()
    record = json.loads((tmp_path / "reading.json").read_text())
    assert {"device", "versions", "git"} <= set(record)
    assert [(row["sliced"], row["shape"], row["tokens"]) for row in record["rows"]] == [
        (True, "32 x 32", 16 + 4 * 5), (True, "64 x 32", 16 + 4 * 9), (False, "32 x 32", 17), (False, "64 x 32", 17),
    ]  # fmt: skip
    assert all(0 <= row["read"] <= 1 and row["model"] == "llava-next-tiny" for row in record["rows"])
    assert (tmp_path / "reading.png").stat().st_size > 5000 and "32 x 32" in capsys.readouterr().out


def test_no_pages_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reading", "--run", str(run), "--pages", "0"])
    with pytest.raises(SystemExit):
        reading.main()
    assert "--pages: got 0, expected 1 or more" in capsys.readouterr().err
