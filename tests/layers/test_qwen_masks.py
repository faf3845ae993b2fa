"""Masks of the Qwen resampler: those that leave every query one run of tokens are intervals, the others dense."""

from __future__ import annotations

import pytest
import torch

from mmkernels.layers import QwenResampler, qwen_resampler

ROWS, TOKENS, HEADS = 9, 16, 4


@pytest.fixture
def resampler() -> QwenResampler:
    torch.manual_seed(0)
    made = QwenResampler(3, 32, HEADS, 20).double()
    with torch.no_grad():
        made.out.bias.normal_()
    return made


@pytest.fixture
def dense(monkeypatch):
    """How often the dense form ran; called with True it always does."""
    calls: list[int] = []
    attend, runs = qwen_resampler._masked_attention, qwen_resampler._runs
    monkeypatch.setattr(qwen_resampler, "_masked_attention", lambda *a: calls.append(1) or attend(*a))

    def force(always: bool) -> list[int]:
        monkeypatch.setattr(qwen_resampler, "_runs", lambda mask: None if always else runs(mask))
        calls.clear()
        return calls

    return force


def blocked(kind: str) -> torch.Tensor:
    """bool, True where a query must not look."""
    token, row = torch.arange(TOKENS), torch.arange(ROWS).unsqueeze(1)
    if kind == "prefix":
        return token >= 1 + row
    if kind == "window":
        return (token < row) | (token > row + 3)
    if kind == "nothing":
        return torch.ones(ROWS, TOKENS, dtype=torch.bool)
    if kind == "some_nothing":
        return (token >= 1 + row) | (row == 4)
    hole = token == 5
    return hole.expand(ROWS, TOKENS).clone()


def results(resampler: QwenResampler, mask: torch.Tensor) -> list[torch.Tensor]:
    x = torch.randn(2, TOKENS, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    resampler.zero_grad()
    y = resampler(x, attn_mask=mask)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in resampler.parameters() if p.grad is not None)]


@pytest.mark.parametrize("form", ["bool", "float", "per_head"])
@pytest.mark.parametrize("kind", ["prefix", "window", "nothing", "some_nothing", "hole"])
def test_runs_are_intervals_and_give_the_same(resampler, dense, kind, form):
    mask = blocked(kind)
    if form == "float":
        mask = torch.zeros(ROWS, TOKENS, dtype=torch.float64).masked_fill(mask, -torch.inf)
    if form == "per_head":  # the second image's heads see everything
        mask = torch.cat([mask.expand(HEADS, -1, -1), torch.zeros(HEADS, ROWS, TOKENS, dtype=torch.bool)])
    calls = dense(False)
    found = results(resampler, mask)
    assert len(calls) == (kind == "hole")
    dense(True)
    for ours, theirs in zip(found, results(resampler, mask), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_bias_and_a_mask_that_learns_are_dense(resampler, dense):
    calls = dense(False)
    bias = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    bias[2, 3] = 0.5
    results(resampler, bias)
    learned = torch.zeros(ROWS, TOKENS, dtype=torch.float64, requires_grad=True)
    results(resampler, learned)
    assert len(calls) == 2 and learned.grad is not None


def test_no_images_and_a_mask_for_each_head(resampler):
    empty = torch.zeros(0, TOKENS, 20, dtype=torch.float64)
    assert resampler(empty, attn_mask=torch.zeros(0, ROWS, TOKENS, dtype=torch.bool)).shape == (0, ROWS, 32)
