"""The frames benchmark: what it times is right, what it writes is complete, and a wrong row has no time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import frames


@pytest.fixture(autouse=True)
def few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: (make, (1, 3)) for name, (make, _) in frames.SERIES.items() if name != "core"}
    monkeypatch.setattr(frames, "SERIES", short)
    monkeypatch.setattr(frames, "SECONDS", 0.01)


def test_a_run_writes_its_record_and_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["frames", "--series", "connector,model", "--out", str(tmp_path)])
    frames.main()
    record = json.loads((tmp_path / "frames.json").read_text())
    assert {"device", "versions", "git"} <= set(record)
    assert [(row["op"], row["frames"]) for row in record["rows"]] == [
        (f"frames_{name}", n) for name in ("connector", "model") for n in (1, 3)
    ]
    for row in record["rows"]:
        assert row["correct"] and row["ms"]["median"] > 0 and row["input_bytes"] > 0 < row["output_bytes"]
        assert set(row["ratio"]) == ({"eager"} if row["op"] == "frames_connector" else set())
    assert (tmp_path / "frames.png").stat().st_size > 5000
    assert "3 frames" in capsys.readouterr().out


def test_a_wrong_row_is_not_timed(monkeypatch):
    eager = frames._eager
    monkeypatch.setattr(frames, "_eager", lambda *given: eager(*given) * 1.01)
    assert [("ms" in row, row["correct"]) for row in frames.rows("connector")] == [(False, False)] * 2


def test_the_peer_is_the_published_core():
    torch.manual_seed(0)
    layer = frames.ContextAttention(12, 8, qformer=frames.QFormerConfig(8, 1, 1, 8, image_width=12, vocab=0))
    q, x = torch.randn(3, 4, 12), torch.randn(3, 9, 12)
    torch.testing.assert_close(frames._eager_tokens(layer, q, x), layer.attend(q, x))


def test_unknown_series_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["frames", "--series", "cores"])
    with pytest.raises(SystemExit):
        frames.main()
    assert "--series: got cores, expected some of connector, model" in capsys.readouterr().err
