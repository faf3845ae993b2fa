"""The MoE layer against DeepSpeed's, its edges, its weights' names, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from published_moe import DeepSpeedMoE, renamed

from mmkernels import weights
from mmkernels.layers import MLP, ExpertsConfig, MoE

WIDTH, HIDDEN = 24, 40


def _pair(activation: str, k: int, factor: float, residual: bool = False, experts: int = 4):
    torch.manual_seed(0)
    theirs = DeepSpeedMoE(WIDTH, HIDDEN, experts, k, factor, activation, residual).double()
    with torch.no_grad():
        theirs.deepspeed_moe.gate.wg.weight.mul_(8)  # far from balance: experts overflow
    ours = MoE(
        WIDTH,
        HIDDEN,
        experts,
        k,
        capacity_factor=factor,
        policy="deepspeed",
        activation=activation,
        residual=residual,
    ).double()
    weights.load(ours, theirs.state_dict(), source="deepspeed")
    return ours, theirs


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("activation", "k", "factor"), [("gelu_tanh", 2, 0.5), ("swiglu", 2, 0.4), ("gelu", 1, 0.7)]
)
def test_it_is_deepspeeds_layer_drops_and_gradients_included(activation, k, factor, residual):
    ours, theirs = _pair(activation, k, factor, residual)
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64, requires_grad=True)
    noise = -torch.empty(26, 4, dtype=torch.float64).exponential_().log() if k == 2 else None
    (y, aux), (expected, their_aux) = ours(x, noise), theirs(x, noise)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aux, their_aux, rtol=1e-9, atol=1e-9)
    assert (ours.run(x, noise)[1].weights == 0).any()  # some were dropped
    grad = torch.randn_like(y)
    ours_grads = torch.autograd.grad((y * grad).sum() + aux, (x, ours.gate.weight, ours.w_in, ours.w_out))
    gx, gate, *_ = torch.autograd.grad(
        (expected * grad).sum() + their_aux, (x, theirs.deepspeed_moe.gate.wg.weight), retain_graph=True
    )
    torch.testing.assert_close(ours_grads[0], gx, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours_grads[1], gate, rtol=1e-8, atol=1e-9)
    parts = theirs.deepspeed_moe.experts.deepspeed_experts
    for n, expert in enumerate(parts):
        down = expert.get_submodule(expert.down).weight
        (their_down,) = torch.autograd.grad((theirs(x, noise)[0] * grad).sum(), down)
        torch.testing.assert_close(ours_grads[3][n], their_down, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("activation", "names"),
    [
        ("swiglu", {}), ("swiglu", {"gate_proj": "w2", "up_proj": "w1", "down_proj": "c_proj"}),
        ("swiglu", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        ("gelu", {"fc1": "dense_h_to_4h", "fc2": "dense_4h_to_h"}), ("gelu", {"fc1": "0", "fc2": "2"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["deepspeed", "moe_llava"])
def test_experts_load_by_the_names_of_their_families(activation, names, source):
    ours, theirs = _pair(activation, 2, 1.0, residual=True)
    state = renamed(theirs.state_dict(), names)
    fresh = MoE(WIDTH, HIDDEN, 4, 2, policy="deepspeed", activation=activation, residual=True).double()
    weights.load(fresh, state, source=source)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in fresh.state_dict().items())
    lost = next(key for key in state if "deepspeed_experts.3" in key)
    del state[lost]
    with pytest.raises(ValueError, match=r"missing: .*deepspeed_experts"):
        weights.load(fresh, state, source=source)
    state[lost], state["deepspeed_moe.experts.deepspeed_experts.4.more"] = torch.ones(1), torch.ones(1)
    with pytest.raises(ValueError, match=r"left over: .*deepspeed_experts\.4\.more"):
        weights.load(fresh, state, source=source)


def test_mixtral_loads_from_disk_and_from_memory():
    torch.manual_seed(0)
    w = {f"experts.{e}.{n}.weight": torch.randn(HIDDEN, WIDTH) for e in range(3) for n in ("w1", "w3")}
    w |= {f"experts.{e}.w2.weight": torch.randn(WIDTH, HIDDEN) for e in range(3)}
    w["gate.weight"] = torch.randn(3, WIDTH)
    disk, memory = (MoE(WIDTH, HIDDEN, 3, 2) for _ in range(2))
    weights.load(disk, w, source="mixtral")
    both = [torch.cat([w[f"experts.{e}.w1.weight"], w[f"experts.{e}.w3.weight"]]) for e in range(3)]
    joined = {
        "gate.weight": w["gate.weight"], "experts.gate_up_proj": torch.stack(both),
        "experts.down_proj": torch.stack([w[f"experts.{e}.w2.weight"] for e in range(3)]),
    }  # fmt: skip
    weights.load(memory, joined, source="mixtral")
    assert all(torch.equal(a, b) for a, b in zip(disk.parameters(), memory.parameters(), strict=True))
    x = torch.randn(5, WIDTH)
    p = (x @ w["gate.weight"].T).softmax(-1)
    top, ids = p.topk(2)
    expected = torch.zeros_like(x)
    for t in range(5):
        for weight, e in zip(top[t] / top[t].sum(), ids[t].tolist(), strict=True):
            gate, up = w[f"experts.{e}.w1.weight"] @ x[t], w[f"experts.{e}.w3.weight"] @ x[t]
            expected[t] += weight * (w[f"experts.{e}.w2.weight"] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(disk(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh", "relu", "squared_relu", "geglu"])
def test_copies_of_one_feed_forward_are_that_feed_forward(activation):
    torch.manual_seed(0)
    mlp = MLP(WIDTH, HIDDEN, activation, bias=activation != "swiglu").double()
    moe = MoE.of(mlp, ExpertsConfig(4, 2))
    assert moe.gate.weight.dtype == torch.float32 and moe.w_in.dtype == torch.float64
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    y, _ = moe(x)
    torch.testing.assert_close(y, mlp(x), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(moe.expert(3)(x), mlp(x))
    y.sum().backward()
    assert moe.w_in.grad is not None
    torch.testing.assert_close(
        moe.w_in.grad.sum(0), torch.autograd.grad(mlp(x).sum(), mlp.up.weight)[0], rtol=1e-6, atol=1e-8
    )


def test_capacity_is_of_the_mode_it_is_in():
    moe = MoE(
        WIDTH, HIDDEN, 4, 2, capacity_factor=1.5, eval_capacity_factor=2.0, policy="deepspeed", min_capacity=4
    )
    assert moe.capacity(100) == 75 and moe.eval().capacity(100) == 100 and moe.capacity(1) == 4
    assert MoE(WIDTH, HIDDEN, 4, 2).capacity(100) is None
    with torch.no_grad():
        moe.gate.weight.zero_()  # equal logits: everybody wants experts 0 and 1
        moe.train()
        _, routing = moe.run(torch.randn(20, WIDTH))
        assert routing.counts.tolist() == [15, 15, 0, 0]
        _, routing = moe.eval().run(torch.randn(20, WIDTH))
        assert routing.counts.tolist() == [20, 20, 0, 0]


def test_no_tokens_and_idle_experts_have_exact_zero_gradients():
    moe = MoE(WIDTH, HIDDEN, 4, 2)
    y, aux = moe(torch.empty(2, 0, WIDTH, requires_grad=True))
    (y.sum() + aux).backward()
    assert y.shape == (2, 0, WIDTH) and all(not p.grad.any() for p in moe.parameters())
    moe.zero_grad()
    with torch.no_grad():
        moe.gate.weight.zero_()
    moe(torch.randn(3, WIDTH))[0].sum().backward()
    assert moe.w_in.grad[:2].any() and not moe.w_in.grad[2:].any() and not moe.w_out.grad[2:].any()


def test_masked_tokens_go_nowhere():
    moe = MoE(WIDTH, HIDDEN, 4, 2, capacity_factor=1.0, policy="deepspeed")
    x, mask = torch.randn(2, 6, WIDTH), torch.tensor([[True] * 6, [False] * 6])
    y, routing = moe.run(x, mask=mask)
    alone, _ = moe.run(x[:1])
    assert not y[1].any() and int(routing.counts.sum()) <= 12
    assert (y[0].abs().sum(1) > 0).sum() >= (alone[0].abs().sum(1) > 0).sum()  # twelve places for six tokens


def test_the_router_is_wide_whatever_the_rest_is():
    torch.manual_seed(0)
    moe = MoE(WIDTH, HIDDEN, 4, 2).to(torch.bfloat16)
    x = torch.randn(9, WIDTH)
    logits = x.bfloat16().float() @ moe.gate.weight.float().T
    expected = logits.softmax(-1).topk(2)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, routing = moe.run(x.bfloat16())
        assert y.dtype == torch.bfloat16 and routing.aux_loss.dtype == torch.float32
        assert torch.equal(routing.experts.long(), expected.indices)
        torch.testing.assert_close(routing.weights, expected.values / expected.values.sum(1, keepdim=True))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert MoE(WIDTH, HIDDEN, 4, 2).gate.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_sampling_draws_the_second_choice_alone():
    torch.manual_seed(0)
    moe = MoE(WIDTH, HIDDEN, 8, 2, policy="deepspeed", sampling=True).eval()
    x = torch.randn(64, WIDTH)
    a, b = moe.route(x), moe.route(x)
    assert torch.equal(a.experts[:, 0], b.experts[:, 0]) and not torch.equal(a.experts[:, 1], b.experts[:, 1])
    torch.manual_seed(7)
    c = moe.route(x)
    torch.manual_seed(7)
    assert torch.equal(c.experts, moe.route(x).experts)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"top_k": 5}, "top_k: got 5, expected at most experts = 4"),
        ({"experts": 0}, "experts: got 0, expected a positive integer"),
        (
            {"capacity_factor": 0.0, "policy": "deepspeed"},
            "capacity_factor: got 0.0, expected a positive number or None",
        ),
        ({"capacity_factor": 1.5}, "capacity_factor: got one with policy 'dropless'"),
        ({"min_capacity": -1}, "min_capacity: got -1"),
        ({"policy": "topk"}, "policy: got 'topk', expected one of"),
        ({"activation": "tanh"}, "activation: got 'tanh', expected one of"),
    ],
)
def test_what_is_no_layer_is_refused(given, match):
    arguments = {"experts": 4, "top_k": 2, **given}
    with pytest.raises(ValueError, match=match):
        MoE(WIDTH, HIDDEN, arguments.pop("experts"), arguments.pop("top_k"), **arguments)


def test_what_is_no_input_is_refused():
    moe = MoE(WIDTH, HIDDEN, 4, 2)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 5\), expected \[\.\.\., 24\]"):
        moe(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"mask: got torch\.float32"):
        moe.run(torch.ones(3, WIDTH), mask=torch.ones(3))
    with pytest.raises(ValueError, match="noise: got shape"):
        moe(torch.ones(3, WIDTH), torch.ones(2, 4))
    with pytest.raises(ValueError, match="number: got 4, expected 0 to 3"):
        moe.expert(4)
