"""The bench of LaVIN's adapter: both forms agree before they are timed, and a row says what it has to."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import adapters


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(adapters, "SHAPES", {"small": (2, 3, 16)})


def test_rows():
    forward, backward = adapters.rows(seconds=0.02)
    assert (forward["pass"], backward["pass"]) == ("fwd", "fwd+bwd")
    for row in (forward, backward):
        assert row["correct"] and row["shape"] == "small" and row["op"] == "modality_adapter"
        assert row["ms"]["median"] > 0 and row["ratio"]["eager"] > 0 and row["floor_ms"] > 0


def test_nothing_wrong_is_timed(monkeypatch):
    right = adapters.eager
    monkeypatch.setattr(adapters, "eager", lambda layer, x: right(layer, x) + torch.tensor(0.5) * x)
    assert [("ms" in row, row["correct"]) for row in adapters.rows(seconds=0.02)] == [(False, False)] * 2


def test_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["adapters", "--seconds", "0.02", "--out", str(tmp_path / "rows.json")])
    adapters.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == printed and len(printed) == 2
