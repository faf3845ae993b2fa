"""The experts: what they give back, what is kept for the gradient, wild routings, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import Routing, moe_ffn, moe_route, using
from mmkernels.primitives._op import OPS

BACKENDS = [
    row.backend for row in OPS["moe_ffn"].rows["cpu"] if not row.present() and row.backend != "triton"
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _experts(e: int, c: int, f: int) -> tuple[Tensor, Tensor]:
    return _normal(e, 2 * f, c, seed=1) / 4, _normal(e, c, f, seed=2) / 4


def test_identity_experts_bring_tokens_back(backend: str) -> None:
    x, eye = _normal(23, 6), torch.eye(6).expand(5, 6, 6)
    for policy, k in (("dropless", 3), ("deepspeed_top2", 2)):
        routing = moe_route(_normal(23, 5, seed=2), k, policy=policy)
        torch.testing.assert_close(moe_ffn(x, routing, eye, eye, activation=None), x)
    half = moe_route(_normal(23, 5, seed=2), 2, policy="deepspeed_top2", capacity=2)
    kept = (half.inverse >= 0).view(23, 2).any(1)
    out = moe_ffn(x, half, eye, eye, activation=None)
    torch.testing.assert_close(out[kept], x[kept])
    assert bool((out[~kept] == 0).all()) and not bool(kept.all())


def test_experts_without_tokens_have_gradients_of_exactly_0(backend: str) -> None:
    w_in, w_out = (w.requires_grad_() for w in _experts(256, 4, 3))
    x, b_in, b_out = (
        _normal(8, 4),
        torch.zeros(256, 6, requires_grad=True),
        torch.zeros(256, 4, requires_grad=True),
    )
    routing = moe_route(_normal(8, 256), 2)
    torch.use_deterministic_algorithms(True)
    try:
        moe_ffn(x, routing, w_in, w_out, b_in=b_in, b_out=b_out).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    empty = routing.counts == 0
    for w in (w_in, w_out, b_in, b_out):
        assert w.grad is not None and bool((w.grad[empty] == 0).all()) and bool(w.grad.isfinite().all())


def test_nan_of_a_dropped_token_reaches_nothing(backend: str) -> None:
    w_in, w_out = (w.requires_grad_() for w in _experts(3, 6, 5))
    mask = torch.tensor([True] * 5 + [False])
    routing, x = moe_route(_normal(6, 3), 2, mask=mask), _normal(6, 6)
    grads = []
    for garbage in (0.0, float("nan")):
        given = torch.cat([x[:5], torch.full((1, 6), garbage)]).requires_grad_()
        out = moe_ffn(given, routing, w_in, w_out)
        assert bool((out[5] == 0).all())
        grads.append((out.detach(), *torch.autograd.grad(out.sum(), (given, w_in, w_out))))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_of_tokens_times_choices_times_channels_is_kept() -> None:
    tokens, k, channels = 64, 2, 96
    w_in, w_out = (w.requires_grad_() for w in _experts(4, channels, 8))
    x = _normal(tokens, channels).requires_grad_()
    routing = moe_route(_normal(tokens, 4), k)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in {p.data_ptr() for p in (x, w_in, w_out)}:
            saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_ffn(x, routing, w_in, w_out)
    assert (
        saved and max(saved) == tokens * k * 16 < tokens * k * channels
    )  # the middle, before its activation


def test_a_wild_routing_is_refused_and_never_followed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (w_in, w_out) = _normal(4, 6), _experts(3, 6, 5)
    good = moe_route(_normal(4, 3), 2)
    order, counts = good.order.clone(), good.counts.clone()
    order[2] = 9
    with pytest.raises(ValueError, match=r"routing\.order: row 2 has 9, expected 0 <= it < 8"):
        moe_ffn(x, good._replace(order=order), w_in, w_out)
    counts[0] += 3
    with pytest.raises(ValueError, match=r"routing\.counts: got counts that add up to 11"):
        moe_ffn(x, good._replace(counts=counts), w_in, w_out)
    with pytest.raises(ValueError, match=r"routing\.inverse: row 0 has 77"):
        moe_ffn(x, good._replace(inverse=torch.full_like(good.inverse, 77)), w_in, w_out)
    monkeypatch.setattr(OPS["moe_ffn"], "_check", None)
    for wild in (2**31 - 1, -(2**31), 8):
        given = x.clone().requires_grad_()
        inverse = good.inverse.clone()
        order[2], inverse[1] = wild, wild
        out = moe_ffn(given, good._replace(order=order, inverse=inverse), w_in, w_out)
        out.sum().backward()
        assert bool(out.isfinite().all()) and given.grad is not None and bool(given.grad.isfinite().all())


def test_autocast_takes_operands_and_leaves_weights(backend: str) -> None:
    x, (w_in, w_out) = _normal(9, 8), _experts(4, 8, 6)
    routing = moe_route(_normal(9, 4), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe_ffn(x, routing, w_in, w_out)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, moe_ffn(x.bfloat16(), routing, w_in.bfloat16(), w_out.bfloat16()))


def test_one_token_and_its_gradient(backend: str) -> None:
    w_in, w_out = (w.double().requires_grad_() for w in _experts(4, 6, 5))
    x, logits = _normal(1, 6).double().requires_grad_(), _normal(1, 4).double().requires_grad_()

    def run(*inputs: Tensor) -> Tensor:
        return moe_ffn(inputs[0], moe_route(inputs[1], 2), *inputs[2:])

    with using("reference"):
        assert torch.autograd.gradcheck(run, (x, logits, w_in, w_out))


def test_bad_arguments_are_named() -> None:
    x, (w_in, w_out), routing = _normal(5, 6), _experts(3, 6, 4), moe_route(_normal(5, 3), 2)
    for error, match, call in (
        (ValueError, "w_out: got 3 columns, expected half of w_in's 8 rows", lambda: moe_ffn(x, routing, w_in, w_out[..., :3])),
        (ValueError, "w_out: got 4 columns, expected w_in's 8 rows",
         lambda: moe_ffn(x, routing, w_in, w_out, activation="gelu")),
        (ValueError, "routing: got one of 5 tokens and 3 experts, expected 4", lambda: moe_ffn(x[:4], routing, w_in, w_out)),
        (ValueError, "expected 5 tokens and 2 experts", lambda: moe_ffn(x, routing, w_in[:2], w_out[:2])),
        (ValueError, "w_in: got shape", lambda: moe_ffn(x[:, :5], routing, w_in, w_out)),
        (ValueError, "b_in: got shape", lambda: moe_ffn(x, routing, w_in, w_out, b_in=torch.zeros(3, 4))),
        (ValueError, "activation: got 'tanh'", lambda: moe_ffn(x, routing, w_in, w_out, activation="tanh")),
        (ValueError, r"routing.order: got shape \(9,\), expected \[10\]",
         lambda: moe_ffn(x, routing._replace(order=routing.order[:9]), w_in, w_out)),
        (TypeError, "w_out: got torch.float64", lambda: moe_ffn(x, routing, w_in, w_out.double())),
        (TypeError, "order: got torch.int64",
         lambda: moe_ffn(x, Routing(*routing)._replace(order=routing.order.long()), w_in, w_out)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
