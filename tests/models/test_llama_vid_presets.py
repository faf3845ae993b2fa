"""The published LLaMA-VID models: sizes, tokens a frame, and the three stages of training."""

from __future__ import annotations

import pytest
import torch

from mmkernels import models
from mmkernels.models.llama_vid import rotary_scaling


def _eva(size: int) -> int:
    block = 4 * 1408**2 + 4 * 1408 + 2 * 1408 * 6144 + 6144 + 1408 + 4 * 1408
    return 3 * 14 * 14 * 1408 + 1408 + 1408 + ((size // 14) ** 2 + 1) * 1408 + 39 * block


def _connector(lm: int) -> int:
    h, f, c = 768, 3072, 1408
    layer = 4 * h**2 + 4 * h + 2 * h + 2 * (2 * h * f + f + h + 2 * h)
    cross = 2 * (h * h + h) + 2 * (c * h + h) + 2 * h
    bert = 32 * h + (30_523 + 512) * h + 2 * h + 12 * layer + 6 * cross
    return bert + 2 * c + (h * c + c) + (c * c + c) + 2 * (c * lm + lm) + lm * lm + lm


def _llama(width: int, layers: int, hidden: int) -> int:
    return 2 * 32_000 * width + layers * (4 * width**2 + 3 * width * hidden + 2 * width) + width


SEVEN, THIRTEEN = (_llama(4096, 32, 11_008) + _connector(4096), _llama(5120, 40, 13_824) + _connector(5120))
PUBLISHED = {
    "llama-vid-7b": (SEVEN + _eva(224), 2),
    "llama-vid-13b": (THIRTEEN + _eva(224), 2),
    "llama-vid-7b-image": (SEVEN + _eva(336), 577),
    "llama-vid-13b-image": (THIRTEEN + _eva(336), 577),
    "llama-vid-7b-long": (SEVEN + _eva(224), 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name: str) -> None:
    size, tokens = PUBLISHED[name]
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    assert abs(sum(p.numel() for p in model.parameters()) / size - 1) < 1e-3
    assert abs(sum(p.numel() for p in model.connector.qformer.parameters()) / 186e6 - 1) < 0.01  # type: ignore[union-attr]
    assert model.config.tokens_per_frame == tokens  # type: ignore[union-attr]


def test_the_recipe_is_the_published_one() -> None:
    """Which parts learn in which stage; the tower never does."""
    model = models.build("llama-vid-7b-long", device="meta")
    projections = {"query", "key", "value", "content_up", "content_down"}
    everything = projections | {"norm", "qformer"}
    expected = {
        "alignment": (1e-3, projections, False),
        "instruction": (2e-5, everything, True),
        "long_video": (2e-5, {"content_up", "content_down"}, True),
    }
    for stage in model.stages():  # type: ignore[operator]
        stage.freeze(model)
        rate, parts, language = expected.pop(stage.name)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert stage.learning_rate == rate and set(stage.losses) == set(stage.mix)
        assert {n.split(".")[1] for n in trained if n.startswith("connector.")} == parts
        assert any(n.startswith("lm.") for n in trained) == language
        assert not any(n.startswith("vision.") for n in trained)
    assert not expected
    config = model.config
    assert (config.lm.max_positions, config.lm.rotary_scaling) == (65_536, 16.0)  # type: ignore[union-attr]
    assert [rotary_scaling(n, 4096) for n in (100, 4096, 4097, 65_536)] == [1, 1, 2, 16]
