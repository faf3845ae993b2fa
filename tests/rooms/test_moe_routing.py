"""The router against published gating: who goes where, with what weight, who is dropped, and what the losses are."""

from __future__ import annotations

from typing import Any

import published_gating as published
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import Routing, moe_capacity, moe_route, using
from mmkernels.primitives._op import OPS

BACKENDS = [
    row.backend for row in OPS["moe_route"].rows["cpu"] if not row.present() and row.backend != "triton"
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _draw(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _dense(r: Routing, places: int) -> Tensor:
    """combine [T, E, C] as published, from the places of the buffers."""
    t, k = r.weights.shape
    combine = torch.zeros(t, len(r.counts), max(places, 1))
    starts = F.pad(r.counts.cumsum(0), (1, 0)).tolist()
    for place, route in enumerate(r.order[: int(r.counts.sum())].tolist()):
        token, j = divmod(route, k)
        e = int(r.experts[token, j])
        assert int(r.inverse[route]) == place
        combine[token, e, place - starts[e]] += r.weights[token, j]
    return combine


def _agrees(r: Routing, found: published.Gating, places: int) -> None:
    l_aux, combine, _ = found
    torch.testing.assert_close(_dense(r, places)[..., :places], combine, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.aux_loss, l_aux, rtol=1e-5, atol=1e-6)
    dropped = (r.inverse < 0).view(r.weights.shape)
    assert bool((r.weights[dropped] == 0).all()) and bool((r.order[int(r.counts.sum()) :] == -1).all())


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("experts", [2, 4, 7])
def test_top2_is_deepspeeds(backend: str, experts: int, factor: float) -> None:
    for seed in range(4):
        logits, u = 2 * _normal(29, experts, seed=seed), _draw(29, experts, seed=seed + 9)
        places = moe_capacity(29, experts, factor, 2, least=1)
        for gumbel in (None, -torch.log(-torch.log(u))):
            r = moe_route(logits, 2, policy="deepspeed_top2", capacity=places, noise=gumbel)
            found = published.top2(logits, factor, 1, gumbel)
            _agrees(r, found, places)
            assert torch.equal(r.experts[:, 0].bincount(minlength=experts), found[2])


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_top1_with_random_selection_is_deepspeeds(backend: str, factor: float) -> None:
    for seed in range(4):
        logits, draw = _normal(31, 4, seed=seed), _draw(31, 4, seed=seed + 9).clamp(min=1e-6)
        places = moe_capacity(31, 4, factor, least=2)
        for used in (None, torch.arange(31) % 5 > 0):
            r = moe_route(logits, 1, policy="deepspeed_top1", capacity=places, noise=draw, mask=used)
            found = published.top1(logits, factor, 2, draw, used)
            _agrees(r, found, places)
            assert torch.equal(r.chosen.long(), found[2])


def test_top1_without_a_draw_keeps_as_many(backend: str) -> None:
    """Published code then takes the first of equal numbers as its library pleases; ours the first tokens."""
    logits = _normal(31, 4)
    r = moe_route(logits, 1, policy="deepspeed_top1", capacity=3)
    _, combine, _ = published.top1(logits, 3 * 4 / 31 - 1e-3, 0)
    assert torch.equal(r.counts.long(), (combine > 0).sum((0, 2)))
    kept = (r.inverse >= 0).view(31, 1)
    for e in range(4):
        mine = kept[r.experts == e]
        assert mine.tolist() == sorted(mine.tolist(), reverse=True)


@pytest.mark.parametrize("drop", ["probs", "position"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk_is_deepspeeds(backend: str, k: int, drop: str) -> None:
    for seed, factor in enumerate((0.25, 0.5, 1.0, 2.0)):
        logits, places = _normal(26, 5, seed=seed), moe_capacity(26, 5, factor, k)
        r = moe_route(logits, k, policy=f"deepspeed_{drop}", capacity=places)
        found = published.topk(logits, k, factor, 0, drop)
        _agrees(r, found, places)
        assert torch.equal(r.chosen.float(), found[2])


def test_capacity_is_deepspeeds() -> None:
    for tokens in range(1, 60):
        for experts in (2, 3, 4, 6, 8):
            for factor in (1.0, 1.2, 1.25, 1.5, 2.0):
                for k in (1, 2):
                    expected = published.capacity(tokens, experts, factor * k, 4)
                    assert moe_capacity(tokens, experts, factor, k, least=4) == expected


def test_the_gradient_is_that_of_published_code(backend: str) -> None:
    for places, policy, k, run in (
        (5, "deepspeed_top2", 2, lambda x: published.top2(x, 5 * 4 / 23 / 2 - 1e-3, 0)),
        (4, "deepspeed_probs", 3, lambda x: published.topk(x, 3, 4 * 4 / 23 / 3 - 1e-3, 0, "probs")),
    ):
        logits, w = _normal(23, 4, seed=3).requires_grad_(), _normal(23, 4, seed=4)
        l_aux, combine, _ = run(logits)
        expected = torch.autograd.grad((combine.sum(2) * w).sum() + 3 * l_aux, logits)[0]
        r = moe_route(logits, k, policy=policy, capacity=places)
        loss = (r.weights * w.gather(1, r.experts.long())).sum() + 3 * r.aux_loss
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, rtol=1e-4, atol=1e-6)


def test_first_choices_come_before_second_ones(backend: str) -> None:
    logits = torch.tensor(
        [[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]
    )  # expert 0: second choices 0, 1, first choice 2
    r = moe_route(logits, 2, policy="deepspeed_top2", capacity=2)
    assert (
        r.order.tolist() == [4, 1, 0, 2, -1, -1]
        and r.counts.tolist() == [2, 2]
        and r.chosen.tolist() == [3, 3]
    )
    assert r.weights[1].tolist() == [1.0, 0.0]  # the only route that survives weighs 1
    plain = moe_route(logits, 2, policy="topk_capacity", capacity=2)
    assert plain.order.tolist() == [1, 3, 0, 2, -1, -1] and plain.weights[2].tolist() == [0.0, 0.0]


def test_weights_are_renormalised_before_or_after_dropping(backend: str) -> None:
    logits, rules = _normal(19, 4), {"policy": "topk_capacity", "capacity": 3}
    p = logits.softmax(1)
    before, after, raw = (
        moe_route(logits, 3, renormalize=how, **rules) for how in ("before", "after", False)
    )  # type: ignore[arg-type]
    kept, chosen = (raw.inverse >= 0).view(19, 3), p.gather(1, raw.experts.long())
    torch.testing.assert_close(raw.weights, chosen * kept)
    torch.testing.assert_close(before.weights, chosen * kept / chosen.sum(1, keepdim=True))
    some = kept.any(1)
    torch.testing.assert_close(after.weights[some].sum(1), torch.ones(int(some.sum())))
    assert 0 < int(some.sum()) < 19 and bool((after.weights[~some] == 0).all())


def test_all_backends_choose_and_place_alike() -> None:
    if "cpp" not in BACKENDS:
        pytest.skip("nothing is compiled here")
    for policy, k, capacity in (
        ("dropless", 3, None), ("deepspeed_top2", 2, 90), ("deepspeed_position", 4, 70), ("deepspeed_probs", 2, 60),
    ):  # fmt: skip
        logits, noise = (
            _normal(500, 9, seed=k),
            None if policy == "deepspeed_probs" else _normal(500, 9, seed=7),
        )
        with using("reference"):
            law = moe_route(logits, k, policy=policy, capacity=capacity, noise=noise)
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            ours = moe_route(logits, k, policy=policy, capacity=capacity, noise=noise)
            torch.set_num_threads(before)
            for name in ("experts", "order", "counts", "inverse", "chosen"):
                assert torch.equal(getattr(ours, name), getattr(law, name)), (policy, name)
            torch.testing.assert_close(ours.weights, law.weights, rtol=1e-6, atol=1e-7)


def test_balanced_values_are_the_published_ones() -> None:
    logits = 30 * torch.eye(4).repeat(3, 1) + 15 * torch.eye(4).roll(1, 1).repeat(3, 1)
    uniform = torch.zeros(12, 4)
    assert moe_route(logits, 2).aux_loss.item() == pytest.approx(2.0, abs=1e-4)
    assert moe_route(uniform, 2).aux_loss.item() == pytest.approx(2.0)
    for policy in ("deepspeed_top2", "topk_capacity", "deepspeed_probs"):
        assert moe_route(logits, 2, policy=policy).aux_loss.item() == pytest.approx(1.0, abs=1e-4)
    assert moe_route(logits, 2, balance="deepspeed").aux_loss.item() == pytest.approx(1.0, abs=1e-4)
    assert moe_route(uniform, 1).z_loss.item() == pytest.approx(torch.tensor(4.0).log().square().item())
