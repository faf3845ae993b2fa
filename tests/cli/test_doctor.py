"""`mmkernels doctor` tells the truth, also about a broken installation."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mmkernels import _native, doctor
from mmkernels.cli.main import main
from mmkernels.primitives._op import OPS


def test_a_sound_installation_exits_zero_and_explains_every_no(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and set(found["ops"]) == set(OPS)
    assert all(why == "" for why in found["self_test"].values())
    assert found["versions"]["torch"] == torch.__version__
    for devices in found["ops"].values():
        assert devices["cpu"]["reference"] == ""
        if not torch.cuda.is_available():
            assert all("CUDA" in why for why in devices["cuda"].values())


def test_the_table_names_ops_and_modules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "interval_attention" in out and "_C_cpu" in out and "self-test" in out


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    op = OPS["interval_attention"]

    def wrong(*args: object) -> tuple[torch.Tensor, ...]:
        out, lse = op.reference(*args)
        return out * 1.01, lse

    broken = dataclasses.replace(
        op.rows["cpu"][0], backend="cpp", call=wrong, present=lambda: "", supports=lambda *a: ""
    )
    monkeypatch.setitem(op.rows, "cpu", [broken, *op.rows["cpu"][-1:]])
    assert main(["doctor", "--json"]) == 1
    assert any("interval_attention: differs" in p for p in json.loads(capsys.readouterr().out)["problems"])


def test_a_module_that_was_built_but_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _native, "build_info", lambda: {"modules": {"_C_cpu": "", "_C_cuda": "no nvcc", "_host": ""}}
    )
    monkeypatch.setitem(_native.reasons, "_C_cpu", "undefined symbol")
    assert doctor.problems({}) == ["_C_cpu was built but does not load: undefined symbol"]
