"""Our policies against DeepSpeed's own gating functions, where its package is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import Routing, moe_capacity, moe_route

gating = pytest.importorskip("deepspeed.moe.sharded_moe")


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _agrees(r: Routing, l_aux: Tensor, combine: Tensor) -> None:
    """combine [T, E, places]."""
    starts = F.pad(r.counts.cumsum(0), (1, 0))
    found = torch.zeros_like(combine)
    place = r.inverse.view(r.weights.shape)
    for j in range(place.shape[1]):
        token = (place[:, j] >= 0).nonzero()[:, 0]
        e = r.experts[token, j].long()
        found[token, e, place[token, j] - starts[e]] += r.weights[token, j]
    torch.testing.assert_close(found, combine, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.aux_loss, l_aux, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 2.0])
def test_top2(factor: float) -> None:
    for seed in range(4):
        logits = 2 * _normal(29, 4, seed=seed)
        l_aux, combine, _, counts = gating.top2gating(
            logits.clone(), factor, 1, top2_2nd_expert_sampling=False
        )
        r = moe_route(logits, 2, policy="deepspeed_top2", capacity=moe_capacity(29, 4, factor, 2, least=1))
        _agrees(r, l_aux, combine)
        assert torch.equal(r.chosen.long(), counts.long())


@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0])
def test_top1_with_its_random_selection(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: dict[Any, Any] = {}
    monkeypatch.setattr(gating, "exp_selection_uniform_map", draws)
    for seed in range(4):
        logits, draw = _normal(31, 4, seed=seed), _normal(31, 4, seed=seed + 9).sigmoid()
        draws[logits.device] = lambda shape, draw=draw: draw
        for used in (None, (torch.arange(31) % 5 > 0)):
            given = None if used is None else used.long()
            l_aux, combine, _, counts = gating.top1gating(logits, factor, 2, given)
            places = moe_capacity(31, 4, factor, least=2)
            r = moe_route(logits, 1, policy="deepspeed_top1", capacity=places, noise=draw, mask=used)
            _agrees(r, l_aux, combine)
            assert torch.equal(r.chosen.long(), counts.long())


@pytest.mark.parametrize("drop", ["probs", "position"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk(k: int, drop: str) -> None:
    for seed, factor in enumerate((0.25, 0.5, 1.0, 2.0)):
        logits = _normal(26, 5, seed=seed)
        l_aux, combine, _, counts = gating.topkgating(logits, k, factor, 0, drop_policy=drop)
        r = moe_route(logits, k, policy=f"deepspeed_{drop}", capacity=moe_capacity(26, 5, factor, k))
        _agrees(r, l_aux, combine)
        assert torch.equal(r.chosen.long(), counts.long())
