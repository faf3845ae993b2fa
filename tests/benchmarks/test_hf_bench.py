"""The bench of patched models: both agree before they are timed."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import hf
from benchmarks.hf_models import Sizes, mixtral


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(hf, "CASES", {"small": (mixtral, Sizes(), ("fwd", "fwd+bwd", "decode"))})
    monkeypatch.setattr(hf, "TOKENS", 2)


def test_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["hf", "--seconds", "0.02", "--out", str(tmp_path / "rows.json")])
    hf.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == printed
    assert [row["pass"] for row in printed] == ["fwd", "fwd+bwd", "decode"]
    assert all(
        row["correct"] and row["ms"]["median"] > 0 and row["ratio"]["unpatched"] > 0 for row in printed
    )


def test_nothing_wrong_is_timed(monkeypatch):
    def spoiled(model):
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)

    monkeypatch.setattr(hf.hf, "patch", spoiled)
    assert [("ms" in row, row["correct"]) for row in hf.rows([], 0.02)] == [(False, False)] * 3
