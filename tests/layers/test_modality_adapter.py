"""LaVIN's adapter against the published computation (convolutions of one place), written out here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import weights
from mmkernels.layers import AdapterConfig, Block, BlockConfig, ModalityAdapter
from mmkernels.layers.attention import Visibility

B, T, C = 3, 5, 12


def published(
    s: dict[str, Tensor], x: Tensor, *, tau: float = 10.0, scale: float = 1.0, w: Tensor | None = None, half: bool = False,
    groups: int = 2,
) -> Tensor:  # fmt: skip
    """x `[B, T, C]`, w `[B, 2]`."""
    if w is None:
        w = ((x[:, 0] @ s["expert_weights.weight"].T + s["expert_weights.bias"]) / tau).softmax(-1)
        w = w.half() if half else w
    z = x.transpose(1, 2)
    a = F.conv1d(z, s["conv_A.weight"], s["conv_A.bias"])
    b, d = (F.conv1d(a, s[f"conv_{n}.weight"], s[f"conv_{n}.bias"], groups=groups) for n in "BD")
    return (b * scale * w[:, 0, None, None] + d * scale * w[:, 1, None, None] + z).transpose(1, 2)


def state(
    width: int = C, rank: int = 8, groups: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "conv_A.weight": (rank, width, 1), "conv_A.bias": (rank,),
        "conv_B.weight": (width, rank // groups, 1), "conv_B.bias": (width,),
        "conv_D.weight": (width, rank // groups, 1), "conv_D.bias": (width,),
        "expert_weights.weight": (2, width), "expert_weights.bias": (2,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


def adapter(s: dict[str, Tensor], **options) -> ModalityAdapter:
    module = ModalityAdapter(C, **options).double().eval()
    weights.load(module, s, source="lavin")
    return module


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (B, T, C), generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 5.0, "scale": 0.25}, {"rank": 6, "groups": 3}, {"rank": 4, "groups": 1}],
    ids=str,
)
def test_it_computes_what_the_published_one_does(options):
    rank, groups = options.get("rank", 8), options.get("groups", 2)
    s, x = state(rank=rank, groups=groups), tokens()
    exact = published(
        s, x, tau=options.get("temperature", 10.0), scale=options.get("scale", 1.0), groups=groups
    )
    torch.testing.assert_close(adapter(s, **options)(x), exact)
    w = torch.rand(B, 2, dtype=torch.float64)
    given = published(s, x, scale=options.get("scale", 1.0), w=w, groups=groups)
    torch.testing.assert_close(adapter(s, **options)(x, weights=w), given)


def test_its_gradients_are_the_published_ones():
    s, x = {k: v.requires_grad_() for k, v in state().items()}, tokens().requires_grad_()
    module, dy = adapter({k: v.detach() for k, v in s.items()}), tokens(B, T, C).flip(0)
    published(s, x).backward(dy)
    y = x.detach().clone().requires_grad_()
    module(y).backward(dy)
    torch.testing.assert_close(y.grad, x.grad)
    grads: dict[str, Any] = {n: p.grad for n, p in module.named_parameters()}
    expected: dict[str, Any] = {n: p.grad for n, p in s.items()}
    joined = torch.stack([expected["conv_B.weight"], expected["conv_D.weight"]]).squeeze(-1)
    torch.testing.assert_close(grads["up"], joined)
    torch.testing.assert_close(
        grads["up_bias"], torch.stack([expected["conv_B.bias"], expected["conv_D.bias"]])
    )
    torch.testing.assert_close(grads["down.weight"], expected["conv_A.weight"].squeeze(-1))
    for ours, theirs in (
        ("down.bias", "conv_A.bias"), ("router.weight", "expert_weights.weight"), ("router.bias", "expert_weights.bias"),
    ):  # fmt: skip
        torch.testing.assert_close(grads[ours], expected[theirs])
    assert torch.autograd.gradcheck(module, (y[:2, :3].detach().requires_grad_(),))
    w = torch.rand(T, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: module(y.detach(), weights=w), (w,))


def test_a_fresh_one_changes_nothing_and_starts_as_published():
    torch.manual_seed(0)
    module, x = ModalityAdapter(64), tokens(2, 3, 64, dtype=torch.float32)
    assert torch.equal(module.train()(x), x)
    assert not module.up.any() and not module.up_bias.any() and not module.down.bias.any()
    bound = (6 / (64 + 8)) ** 0.5
    assert 0.9 * bound < module.down.weight.abs().max() <= bound and module.router is not None
    assert module.router.weight.any()
    assert not ModalityAdapter(64, routed=False)(x).any()
    assert sum(p.numel() for p in ModalityAdapter(4096).parameters()) == 81_930


def test_weights_of_half_precision_and_exact_ones():
    s, x = state(), tokens()
    exact, rounded = adapter(s), adapter(s, router_dtype=torch.float16)
    w = exact.route(x)
    assert w.dtype == torch.float64 and rounded.route(x).dtype == torch.float16
    assert torch.equal(rounded.route(x), w.half()) and not torch.equal(w.half().double(), w)
    torch.testing.assert_close(w.sum(-1), torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close(rounded(x), published(s, x, half=True))
    difference = (rounded(x) - exact(x)).abs().max()
    assert 0 < difference < 1e-2
    low = copy.deepcopy(exact).to(torch.bfloat16)
    assert low.route(x.bfloat16()).dtype == torch.float32  # never narrower
    assert torch.equal(exact.route(x, at=torch.tensor([0, 0, 0])), w)
    assert torch.equal(
        exact.route(x, at=torch.tensor([2, 0, 4])), exact.route(x[[0, 1, 2], [2, 0, 4]][:, None])
    )


def test_weights_for_samples_and_for_tokens():
    s, x = state(), tokens()
    module, per_token = adapter(s), torch.rand(T, 2, dtype=torch.float64)
    # published CLIP blocks run as (token, image, channel): the router reads image 0 at every token
    theirs = published(s, x.transpose(0, 1), w=per_token).transpose(0, 1)
    torch.testing.assert_close(module(x, weights=per_token), theirs)
    torch.testing.assert_close(
        module.adapt(x, "first_image"), published(s, x.transpose(0, 1)).transpose(0, 1)
    )
    alone = torch.cat([module.adapt(one[None], "first_image") for one in x])
    torch.testing.assert_close(module.adapt(x, "token"), alone)  # what a batch of one gives, for every image
    square = x[:, :B]
    torch.testing.assert_close(module(square, weights=per_token[:B]), published(s, square, w=per_token[:B]))
    torch.testing.assert_close(
        module(square, weights=per_token[None, :B]),
        published(s, square.transpose(0, 1), w=per_token[:B]).transpose(0, 1),
    )


def test_the_plain_kind_has_no_residual_and_no_scale():
    s, x = {k: v.float() for k, v in state().items() if k[:6] in ("conv_A", "conv_B")}, tokens().float()
    module = ModalityAdapter(C, routed=False, scale=7.0).eval()
    weights.load(module, s, source="lavin")
    a = F.conv1d(x.transpose(1, 2), s["conv_A.weight"], s["conv_A.bias"])
    plain = F.conv1d(a, s["conv_B.weight"], s["conv_B.bias"], groups=2).transpose(1, 2)
    torch.testing.assert_close(module(x), plain)
    low = copy.deepcopy(module).to(torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.float32
    assert low.adapt(x.bfloat16(), "token").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="routed: got False"):
        module.route(x)
    with pytest.raises(ValueError, match="weights: got some for an adapter with routed=False"):
        module(x, weights=torch.ones(B, 2))


def test_dropout_of_a_tenth_while_training():
    """On what lies between down and up: with an identity up it shows."""
    torch.manual_seed(0)
    module = ModalityAdapter(8, rank=8, groups=1).train()
    with torch.no_grad():
        module.up[0] = torch.eye(8)
    x, only_b = torch.randn(1, 5000, 8), torch.tensor([[1.0, 0.0]])
    a = (module(x, weights=only_b) - x).detach()
    whole = (module.eval()(x, weights=only_b) - x).detach()
    dropped = a.abs() < 1e-6
    assert abs(float(dropped.float().mean()) - 0.1) < 0.01
    torch.testing.assert_close(a[~dropped], whole[~dropped] / 0.9, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_parameters_serve_narrow_tokens(dtype):
    s = {k: v.float() for k, v in state().items()}
    module, x = ModalityAdapter(C).eval(), tokens().to(dtype).requires_grad_()
    weights.load(module, s, source="lavin")
    y = module(x)
    exact = published(s, x.detach().float())
    assert y.dtype == dtype and (y.float() - exact).abs().max() < 0.02 * exact.abs().max()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(tokens().float()).dtype == torch.float32  # the residual is not rounded


def test_what_is_kept_follows_the_parameters():
    """The joined matrix is made once for each of their updates."""
    module, x = adapter(state()), tokens()
    with torch.no_grad():
        before = module(x)
        module.up.mul_(2)
        module.up_bias.mul_(2)
        torch.testing.assert_close(module(x) - x, 2 * (before - x))


def test_one_graph():
    module, x = adapter(state()), tokens()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(compiled(x, torch.rand(B, 2)).shape, x.shape)


def test_a_block_drops_whole_sums_of_a_sequence():
    """Stochastic depth: each of a sequence's two sums is left out, or counts double at p = 1/2."""
    torch.manual_seed(0)
    block = Block(BlockConfig(C, 2, 16, drop_path=0.5, adapter=AdapterConfig())).train()
    x = torch.randn(1, T, C)
    hi = torch.arange(1, T + 1, dtype=torch.int32)[None]
    with torch.no_grad():
        attended = block.attention(block.attention_norm(x), Visibility(torch.zeros_like(hi), hi))
        found = set()
        for _ in range(40):
            y = block(x, Visibility(torch.zeros_like(hi), hi))
            for a in (0, 2):
                h = x + a * attended
                for m in (0, 2):
                    if torch.allclose(y, h + m * block.mlp(block.mlp_norm(h)), atol=1e-5):
                        found.add((a, m))
                        break
        assert found == {(0, 0), (0, 2), (2, 0), (2, 2)}
        assert torch.equal(
            block.eval()(x, Visibility(torch.zeros_like(hi), hi)),
            block(x, Visibility(torch.zeros_like(hi), hi)),
        )
    with pytest.raises(
        ValueError, match="reads: got 'last', expected one of 'first', 'token', 'first_image'"
    ):
        Block(BlockConfig(C, 2, 16, adapter=AdapterConfig(reads="last")))


def test_bad_input_is_refused_by_name():
    module, x = ModalityAdapter(C), tokens().float()
    for match, call in (
        ("groups: got 3, expected a divisor of rank 8", lambda: ModalityAdapter(C, groups=3)),
        ("groups: got 2, expected a divisor of rank 8 and width 13", lambda: ModalityAdapter(13)),
        ("rank: got 0, expected a positive", lambda: ModalityAdapter(C, rank=0)),
        ("temperature: got 0, expected above 0", lambda: ModalityAdapter(C, temperature=0)),
        ("x: got shape", lambda: module(x[0])),
        ("x: got shape", lambda: module(x[..., :4])),
        (r"weights: got shape \(4, 2\), expected \[3, 2\], \[5, 2\]", lambda: module(x, weights=torch.ones(4, 2))),
        (r"weights: got shape \(3, 3\)", lambda: module(x, weights=torch.ones(3, 3))),
        ("x: got 0 tokens", lambda: module(x[:, :0])),
        ("at: got shape", lambda: module.route(x, torch.zeros(2, dtype=torch.int64))),
        ("state_dict: does not fit ModalityAdapter from lavin",
         lambda: weights.load(module, {k: v for k, v in state().items() if "conv_D" not in k}, source="lavin")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"router_dtype: got torch\.int64"):
        ModalityAdapter(C, router_dtype=torch.int64)
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        module(torch.zeros(B, T, C, dtype=torch.int64))
    assert module(x[:, :0], weights=torch.ones(B, 2)).shape == (B, 0, C)
    assert module(x[:0]).shape == (0, T, C)
