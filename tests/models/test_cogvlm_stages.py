"""CogVLM: published sizes, experts that start as the text's weights, stages, and what is frozen stays the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from cogvlm_tiny import IMAGE, grown, ids, pictures

from mmkernels import models


@pytest.fixture(scope="module")
def model() -> models.CogVLM:
    return grown()


def _sizes(model: models.CogVLM) -> dict[str, int]:
    counts = dict.fromkeys(("lm", "experts", "vision", "projector"), 0)
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        counts["experts" if part == "lm" and ".vision." in name else part] += p.numel()
    return counts


@pytest.mark.parametrize(
    ("name", "published", "hidden", "rows", "vocab", "patches", "conv", "bias"),
    [
        ("cogvlm-17b", 17.6e9, 11_008, 3 * 4096, 32_000, 1225, 0, 0),
        ("cogvlm2-19b", 19.5e9, 14_336, 6144, 128_256, 9216, 4 * 1792**2 + 1792, 6144),
    ],
)
def test_presets_have_the_published_sizes(name, published, hidden, rows, vocab, patches, conv, bias):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    expert = rows * 4096 + 4096**2 + 3 * 4096 * hidden
    layer = 4 * 1792**2 + 4 * 1792 + 2 * 1792 * 15_360 + 15_360 + 1792 + 4 * 1792
    assert _sizes(model) == {
        "experts": 32 * (expert + bias),
        "lm": 32 * (expert + 2 * 4096) + 2 * vocab * 4096 + 4096,
        "vision": 63 * layer + 588 * 1792 + 1792 + (patches + 2) * 1792,
        "projector": 1792 * 4096 + 2 * 4096 + 3 * 4096 * hidden + 2 * 4096 + conv,
    }
    assert abs(sum(_sizes(model).values()) - published) < 0.05e9
    assert model.config.places == (1227 if conv == 0 else 2306)
    assert all(p.is_meta for p in model.parameters())


def test_experts_start_as_the_text_weights():
    fresh = models.build("cogvlm-tiny")
    pairs = [(n, n.replace(".vision.", ".text.")) for n, _ in fresh.lm.named_parameters() if ".vision." in n]
    named = dict(fresh.lm.named_parameters())
    assert len(pairs) == 4 * 4
    assert all(torch.equal(named[a], named[b]) and named[a] is not named[b] for a, b in pairs)
    with torch.no_grad():
        fresh.lm.blocks[1].mlp.up.text.weight.add_(1)
    fresh.copy_text_to_vision()
    assert all(torch.equal(named[a], named[b]) for a, b in pairs)


def _step(model: models.CogVLM, stage: models.Stage, steps: int = 2) -> None:
    stage.freeze(model)
    optimizer = torch.optim.AdamW(stage.parameter_groups(model), weight_decay=0.1)
    row = ids(f"E{IMAGE}abcE", f"E{IMAGE}dE")
    for _ in range(steps):
        model(pictures(2), row, row != 0, torch.where(row > 2, row, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_language_model_stays_the_same_bits(model):
    """Through every published stage; what is added, and at last the tower, moves, the tower at a tenth of the rate."""
    model = copy.deepcopy(model).train()
    text = [n for n, _ in model.named_parameters() if n.startswith("lm.") and ".vision." not in n]
    for stage in model.stages()[1:]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        _step(model, stage)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert all(torch.equal(model.get_parameter(n), before[n]) for n in text)
        added = {n for n in before if n.startswith("projector.") or ".vision." in n}
        tower = {n for n in before if n.startswith("vision.")}
        assert added <= moved and moved == (added | (moved & tower))
        assert bool(moved & tower) == (stage.name == "sft")
    rates = {g["scale"]: len(g["params"]) for g in stage.parameter_groups(model)}
    assert rates == {1.0: len(added), 0.1: len(tower)}
    assert all(g["lr"] == stage.learning_rate * g["scale"] for g in stage.parameter_groups(model))


def test_stages_are_the_published_ones(model):
    big = models.build("cogvlm-17b", device="meta")
    for built, first in ((model, 1), (big, 0)):
        stages = built.stages()[first:]
        assert [s.name for s in stages] == ["captioning", "referring", "sft"]
        for stage in stages:
            stage = copy.deepcopy(stage)
            assert set(stage.losses) == set(stage.mix)
            assert all(
                not p.startswith("lm.") or ".vision." in p for p in stage.trainable
            ) and ("vision.*" in stage.trainable) == (stage.name == "sft")  # fmt: skip
    assert [s.steps for s in big.stages()] == [120_000, 60_000, 6_000]
    big.stages()[0].freeze(big)
    assert round(sum(p.numel() for p in big.parameters() if p.requires_grad) / 1e9, 1) == 6.6


def test_a_batch_without_images_reaches_all_parameters(model):
    model = copy.deepcopy(model).train()
    model.stages()[-1].freeze(model)
    row = ids("EabcE")
    model(None, row, labels=row).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and not g.any() for g in grads.values())
