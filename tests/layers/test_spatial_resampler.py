"""Slices of many sizes in one batch, what is behind them, pool sizes, and refusals; arithmetic is tested in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch

from mmkernels.layers import MixtureAdapter, SpatialResampler, TextGuidedRouter, pool_size, sincos_positions

RELEASES = ("original", "eccv", "slime")
SIZES = torch.tensor([[4, 6], [2, 3], [4, 6], [1, 20], [5, 5]])


def _resampler(release: str, **changes) -> SpatialResampler:
    torch.manual_seed(0)
    return SpatialResampler(
        **{"grid": 3, "width": 32, "heads": 4, "media_width": 20, **changes}, release=release
    )


@pytest.mark.parametrize("release", RELEASES)
def test_a_batch_of_sizes_is_each_slice_alone(release):
    r = _resampler(release).double()
    x = torch.randn(5, 25, 20, dtype=torch.float64, requires_grad=True)
    together = r(x, SIZES)
    for n, (h, w) in enumerate(SIZES.tolist()):
        alone = r(x[n : n + 1, : h * w], SIZES[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-12, atol=1e-12)
    together.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in r.parameters())
    for n, (h, w) in enumerate(SIZES.tolist()):
        assert not x.grad[n, h * w :].any()


@pytest.mark.parametrize("release", RELEASES)
def test_what_is_behind_a_slice_changes_nothing(release):
    r, x = _resampler(release), torch.randn(5, 25, 20)
    results = []
    for fill in (0.0, torch.nan, torch.inf):
        given = x.clone()
        for n, (h, w) in enumerate(SIZES.tolist()):
            given[n, h * w :] = fill
        given.requires_grad_()
        r.zero_grad()
        y = r(given, SIZES)
        y.square().sum().backward()
        results.append([y, given.grad, *(p.grad.clone() for p in r.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("release", RELEASES)
def test_no_slices(release):
    y = _resampler(release)(torch.randn(0, 9, 20), torch.zeros(0, 2, dtype=torch.int64))
    assert y.shape == (0, 9, 32)


def test_the_published_width_of_a_head_runs():
    """640 channels a head, beyond what compiled attention takes."""
    r = _resampler("original", width=1280, heads=2)
    assert torch.isfinite(r(torch.randn(1, 6, 20), torch.tensor([[2, 3]]))).all()


def test_slime_s_table_has_the_values_of_half_precision():
    r = _resampler("slime", width=32)
    assert torch.equal(r.positions, sincos_positions(32, 3).half().float())
    assert not hasattr(r, "proj") and r.sources == ("slime",)
    assert _resampler("eccv").proj.std().item() == pytest.approx(32**-0.5, rel=0.2)


def test_pool_sizes():
    want = {
        1.0: (3, 3),
        2.0: (4, 2),
        1.5: (3, 2),
        4 / 3: (4, 3),
        0.5: (2, 4),
        2 / 3: (2, 3),
        0.75: (3, 4),
        9.0: (4, 2),
    }
    assert {ratio: pool_size(ratio) for ratio in want} == want
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="ratio: got"):
            pool_size(ratio)


def test_bad_input_is_refused_by_name():
    r, x = _resampler("eccv"), torch.randn(2, 12, 20)
    hw = torch.tensor([[3, 4], [2, 2]])
    router = TextGuidedRouter("cosine", 8)
    mixture = MixtureAdapter(16, 8, 2, 2)
    for error, match, call in (
        (ValueError, "slice_hw: got 4 x 4 for slice 1, expected positive sizes of at most x's 12 tokens",
         lambda: r(x, torch.tensor([[3, 4], [4, 4]]))),
        (ValueError, "slice_hw: got 0 x 4 for slice 0", lambda: r(x, torch.tensor([[0, 4], [1, 4]]))),
        (ValueError, "slice_hw: got shape", lambda: r(x, hw[:1])),
        (TypeError, "slice_hw: got torch.int32", lambda: r(x, hw.int())),
        (TypeError, "x: got torch.float64", lambda: r(x.double(), hw)),
        (ValueError, "release: got 'v1', expected", lambda: _resampler("v1")),
        (ValueError, "kind: got 'dot', expected", lambda: TextGuidedRouter("dot", 8)),
        (ValueError, "top_p: got 1.5, expected 0 to 1", lambda: TextGuidedRouter("cosine", 8, 1.5)),
        (ValueError, "temperature: got 0, expected a positive", lambda: TextGuidedRouter("cosine", 8, 0.9, 0)),
        (ValueError, "text: got shape", lambda: router(torch.ones(3, 8), torch.ones(3, 7))),
        (TypeError, "mask: got torch.int64", lambda: router(*torch.ones(2, 3, 8), torch.ones(3).long())),
        (ValueError, "expert: got 2, expected", lambda: mixture(torch.ones(1, 4, 16), 2)),
        (ValueError, "x: got shape", lambda: mixture(torch.ones(1, 4, 15))),
        (ValueError, "noise: got shape", lambda: mixture(torch.ones(1, 4, 16), None, torch.ones(1, 4, 3))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_routers_without_tokens_or_text_and_at_their_limits():
    router, tokens = TextGuidedRouter("cosine", 8, 1.0).eval(), torch.randn(6, 8)
    assert router(tokens[:0], tokens).tolist() == []
    assert (
        router(tokens, tokens[:0]).tolist() == list(range(6)) and router.probabilities.unique().numel() == 1
    )
    assert TextGuidedRouter("cosine", 8, 0.0).eval()(tokens, tokens).numel() == 1
    router.train()
    torch.manual_seed(1)
    first = router(tokens, tokens) is not None and router.scores.clone()
    router(tokens, tokens)
    assert not torch.equal(first, router.scores)  # noise


def test_training_draws_the_gates_noise():
    torch.manual_seed(2)
    mixture, x = MixtureAdapter(16, 8, 2, 2), torch.randn(1, 4, 16)
    a, b = mixture(x), mixture(x)
    assert not torch.equal(a, b)
    mixture.eval()
    assert torch.equal(mixture(x), mixture(x))
    torch.testing.assert_close(mixture.gates, torch.full((1, 4, 2), 0.5), rtol=1e-5, atol=1e-5)
