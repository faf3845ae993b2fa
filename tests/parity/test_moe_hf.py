"""Our experts and balancing loss against transformers' Mixtral."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import load_balancing_loss, moe_ffn, moe_route

transformers = pytest.importorskip("transformers")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_the_block_is_mixtrals() -> None:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config)
    torch.manual_seed(3)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = _normal(2, 7, 16).requires_grad_()
    expected = block(x)
    expected = expected if isinstance(expected, Tensor) else expected[0]
    gate, up, down = (
        dict(block.named_parameters())[n]
        for n in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    )
    routing = moe_route(x.flatten(0, 1) @ gate.T, 2)
    found = moe_ffn(x.flatten(0, 1), routing, up, down).view_as(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    leaves, w = (x, gate, up, down), _normal(2, 7, 16, seed=5)
    ours, theirs = (torch.autograd.grad((y * w).sum(), leaves) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_balancing_loss_is_transformers() -> None:
    layers = tuple(_normal(24, 6, seed=seed).requires_grad_() for seed in range(3))
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    for attention in (None, mask):
        expected: Any = mixtral.load_balancing_loss_func(layers, 6, 2, attention)
        found = load_balancing_loss(layers, 6, 2, attention)
        torch.testing.assert_close(found, expected)
        a, b = (torch.autograd.grad(x, layers, retain_graph=True) for x in (found, expected))
        torch.testing.assert_close(a, b)
    one = moe_route(layers[0], 2)
    torch.testing.assert_close(load_balancing_loss(layers[0], 6, 2), one.aux_loss)
    torch.testing.assert_close(load_balancing_loss(layers[0], one.experts, 2), one.aux_loss)
