"""`mmkernels generate` writes the same words at once, piece by piece, and by beams what the model finds by beams."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels.cli.main import main
from mmkernels.data import Tokenizer
from mmkernels.infer import Captioner, Meter


@pytest.fixture
def ask(trained, tmp_path, capsys):
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)

    def run(*options: object) -> str:
        words = ("generate", "--checkpoint", trained, "--image", picture, "--max-new-tokens", 6, *options)
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


def test_a_stream_is_the_answer_in_pieces(ask):
    assert ask("--stream").strip() == ask().strip()


def test_the_rate_of_tokens_is_told(ask):
    told = json.loads(ask("--json"))
    assert told["first_token_seconds"] > 0 and told.get("tokens_per_second", 1.0) > 0


def test_beams_and_draws_are_the_models(ask, trained, tmp_path):
    captioner = Captioner.from_checkpoint(trained)
    picture = tmp_path / "noise.png"
    beams = captioner.caption([picture], max_new_tokens=6, beams=3, length_penalty=2.0)
    assert ask("--beams", 3, "--length-penalty", 2).strip() == beams
    drawn = captioner.caption(
        [picture], max_new_tokens=6, temperature=1.5, top_p=0.9, generator=torch.Generator().manual_seed(4)
    )
    assert ask("--temperature", 1.5, "--top-p", 0.9, "--seed", 4).strip() == drawn


def test_a_meter_shows_whole_characters_only():
    tokenizer, pieces = Tokenizer.train(["a café on a hill", "a cat"], 270), []
    meter = Meter(tokenizer, pieces.append)
    for token in tokenizer.encode("a café"):
        meter(torch.tensor([token]))
    assert "".join(pieces) == "a café" and not any("\ufffd" in piece for piece in pieces)
    assert Meter(tokenizer).rates() == {}
