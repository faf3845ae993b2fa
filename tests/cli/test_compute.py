"""`mmkernels models --compute`: the published counts, and the work behind them against the flops that torch counts."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import models, using
from mmkernels.cli import compute, main
from mmkernels.layers.vision import VisionTower


def test_published_token_counts(capsys):
    assert main.main(["models", "--compute", "--json"]) == 0
    base, sliced, uhd = json.loads(capsys.readouterr().out)["compute"]
    assert base["visual_tokens"] == 576
    assert sliced["visual_tokens"] == 3456
    assert (uhd["views"], uhd["tokens_per_view"], uhd["visual_tokens"], uhd["separators"]) == (7, 64, 448, 6)
    assert uhd["flops"] == uhd["tower"] + uhd["connector"] + uhd["language"]
    assert base["share"] == 1
    assert 6 < sliced["share"] < 6.5
    assert uhd["share"] < 0.97


def test_the_table_is_printed(capsys):
    assert main.main(["models", "--compute"]) == 0
    assert "3456" in capsys.readouterr().out


def test_the_towers_work_is_what_torch_counts():
    config = replace(
        models.config("llava-1.5-7b").vision, image_size=56, width=64, heads=4, hidden=128, layers=3
    )
    tower = VisionTower(config).eval()
    picture = compute.Picture((config.patches,), config.patches)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), using("reference"):
        tower(torch.zeros(1, 3, 56, 56))
    scores = (
        4 * config.depth * (config.patches + 1) ** 2 * config.width
    )  # interval attention is not among torch's products
    assert counter.get_total_flops() + scores == compute.tower(config, picture)
