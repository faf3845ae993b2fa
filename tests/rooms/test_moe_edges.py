"""The router's edges: ties, rows that are no numbers, padding, many experts, none, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import Routing, load_balancing_loss, moe_capacity, moe_route, using
from mmkernels.primitives._op import OPS

BACKENDS = [
    row.backend for row in OPS["moe_route"].rows["cpu"] if not row.present() and row.backend != "triton"
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_ties_go_to_the_lowest_id(backend: str) -> None:
    r = moe_route(torch.zeros(3, 9), 4)
    assert r.experts.tolist() == [[0, 1, 2, 3]] * 3
    r = moe_route(torch.tensor([[0.0, 1.0, 1.0, -0.0, 1.0]]), 4)
    assert r.experts.tolist() == [[1, 2, 4, 0]]


_BAD_ROWS = {
    "nan": [float("nan")] * 5, "one nan": [1.0, float("nan"), 2.0, 0.0, 0.0], "inf": [0.0, float("inf"), 1.0, 0.0, 0.0],
    "two infs": [float("inf"), 0.0, float("inf"), 1.0, 0.0], "-inf": [-float("inf")] * 5, "huge": [7e4, -7e4, 3e38, 0.0, 1.0],
    "mixed": [float("nan"), float("inf"), -float("inf"), 0.0, float("nan")],
}  # fmt: skip


@pytest.mark.parametrize("policy", ["dropless", "deepspeed_top2", "deepspeed_probs", "topk_capacity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_rows_hurt_nobody(backend: str, policy: str, dtype: torch.dtype) -> None:
    good = _normal(6, 5).to(dtype)
    for row in _BAD_ROWS.values():
        logits = torch.cat([good[:3], torch.tensor([row]).to(dtype), good[3:]]).requires_grad_()
        r = moe_route(logits, 2, policy=policy)
        assert bool(((r.experts >= 0) & (r.experts < 5)).all()) and bool(
            (r.experts[:, 0] != r.experts[:, 1]).all()
        )
        assert all(bool(x.isfinite().all()) for x in (r.weights, r.aux_loss))
        others = [0, 1, 2, 4, 5, 6]
        alone = moe_route(good, 2, policy=policy)
        assert torch.equal(r.weights[others], alone.weights) and torch.equal(r.experts[others], alone.experts)
        assert sorted(r.order.tolist()) == list(range(14))
        (grad,) = torch.autograd.grad((r.weights[:, 0]).sum() + r.aux_loss, logits)
        assert bool(grad.isfinite().all())
        if not logits[3].isfinite().all():
            assert bool((grad[3] == 0).all())
            torch.testing.assert_close(r.z_loss, alone.z_loss * 6 / 7)


def test_a_masked_expert_is_no_bad_row(backend: str) -> None:
    logits = torch.tensor([[1.0, -float("inf"), 0.5]], requires_grad=True)
    r = moe_route(logits, 2)
    assert r.experts.tolist() == [[0, 2]]
    (grad,) = torch.autograd.grad(r.weights[0, 0], logits)
    assert grad[0, 0] > 0 and grad[0, 1] == 0 and grad[0, 0].item() == pytest.approx(-grad[0, 2].item())


def test_padding_goes_nowhere(backend: str) -> None:
    logits, mask = _normal(12, 4).requires_grad_(), torch.arange(12) < 8
    for policy in ("dropless", "deepspeed_top2", "topk_capacity", "deepspeed_probs"):
        capacity = None if policy == "dropless" else 3
        r = moe_route(logits, 2, policy=policy, capacity=capacity, mask=mask)
        alone = moe_route(logits[:8], 2, policy=policy, capacity=capacity)
        assert torch.equal(r.weights[:8], alone.weights) and bool((r.weights[8:] == 0).all())
        assert torch.equal(r.order[:16], alone.order) and torch.equal(r.counts, alone.counts)
        torch.testing.assert_close(
            torch.stack([r.aux_loss, r.z_loss]), torch.stack([alone.aux_loss, alone.z_loss])
        )
        (grad,) = torch.autograd.grad(r.weights[:, 0].sum() + r.aux_loss + r.z_loss, logits)
        assert bool((grad[8:] == 0).all())


def test_512_experts_with_winners_above_255(backend: str) -> None:
    logits = _normal(40, 512)
    logits[:, 256:] += 20
    r = moe_route(logits, 8)
    assert int(r.experts.min()) > 255 and torch.equal(r.experts.long(), logits.topk(8).indices)
    assert int(r.counts[:256].sum()) == 0 and int(r.counts.sum()) == 320


def test_edges(backend: str) -> None:
    r = moe_route(_normal(5, 3), 3, policy="deepspeed_position", capacity=0)
    assert r.counts.tolist() == [0, 0, 0] and bool((r.weights == 0).all()) and bool((r.order == -1).all())
    one = moe_route(_normal(5, 1), 1)
    assert one.order.tolist() == [0, 1, 2, 3, 4] and bool((one.weights == 1).all())
    for policy in ("dropless", "deepspeed_top2", "deepspeed_probs"):
        none = moe_route(_normal(0, 3).requires_grad_(), 2, policy=policy)
        assert none.weights.shape == (0, 2) and none.aux_loss == 0 and none.z_loss == 0
        (none.aux_loss + none.weights.sum()).backward()
    every = moe_route(_normal(4, 3), 3)
    assert sorted(every.experts[0].tolist()) == [0, 1, 2]


def test_the_router_stays_float32_under_autocast(backend: str) -> None:
    logits = _normal(9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = moe_route(logits, 2)
    assert r.weights.dtype == r.aux_loss.dtype == torch.float32
    assert torch.equal(r.weights, moe_route(logits, 2).weights)
    low = moe_route(logits.bfloat16(), 2)
    assert low.weights.dtype == torch.float32 and low.weights.bfloat16().float().ne(low.weights).any()


def test_ids_chosen_elsewhere_make_a_routing() -> None:
    experts = torch.tensor([[2, 0], [1, 3], [0, 2]])
    r = Routing.of(experts, torch.ones(3, 2), 3)  # 3: a route to nobody here
    assert r.order.tolist() == [1, 4, 2, 0, 5, -1] and r.counts.tolist() == [2, 1, 2]
    assert r.weights.tolist() == [[1, 1], [1, 0], [1, 1]] and r.inverse.tolist() == [3, 0, 2, -1, 1, 4]
    for wild in (-1, 4):
        with pytest.raises(ValueError, match=f"row 1 has group {wild}, expected 0 to 2, or 3 for none"):
            Routing.of(torch.tensor([[0, wild]]), torch.ones(1, 2), 3)


def test_bad_arguments_are_named() -> None:
    logits = _normal(5, 4)
    for error, match, call in (
        (ValueError, "k: got 5, expected 1 to the 4 experts", lambda: moe_route(logits, 5)),
        (ValueError, "k: got 0, expected 1 to", lambda: moe_route(logits, 0)),
        (ValueError, "k: got 2 with policy 'deepspeed_top1', expected 1",
         lambda: moe_route(logits, 2, policy="deepspeed_top1")),
        (ValueError, "capacity: got -1, expected at least 0", lambda: moe_route(logits, 2, policy="deepspeed", capacity=-1)),
        (ValueError, "capacity: got 3 with policy 'dropless'", lambda: moe_route(logits, 2, capacity=3)),
        (ValueError, "policy: got 'best', expected one of", lambda: moe_route(logits, 2, policy="best")),
        (ValueError, "renormalize: got 'later'", lambda: moe_route(logits, 2, renormalize="later")),
        (ValueError, "balance: got 'even'", lambda: moe_route(logits, 2, balance="even")),
        (ValueError, "logits: got shape", lambda: moe_route(logits[0], 2)),
        (ValueError, "noise: got shape", lambda: moe_route(logits, 2, noise=logits[:2])),
        (ValueError, "mask: got shape", lambda: moe_route(logits, 2, mask=torch.ones(4, dtype=torch.bool))),
        (TypeError, "mask: got torch.int64", lambda: moe_route(logits, 2, mask=torch.ones(5, dtype=torch.int64))),
        (TypeError, "logits: got torch.int64", lambda: moe_route(logits.long(), 2)),
        (ValueError, "experts: got 3, expected 4", lambda: load_balancing_loss(logits, 3, 2)),
        (ValueError, "logits: got no layer", lambda: load_balancing_loss((), 4, 2)),
        (ValueError, "experts: got 0, expected a positive", lambda: moe_capacity(5, 0, 1.0)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
