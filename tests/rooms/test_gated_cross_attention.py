"""Flamingo's mask, row by row against the published rule, and the edges of the gated blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import Intervals, gated_cross_attention, gated_feed_forward, media_intervals, using
from mmkernels.primitives._op import OPS

BACKENDS = [
    row.backend
    for row in OPS["gated_cross_attention"].rows["cpu"]
    if not row.present() and row.backend != "triton"
]
LATENTS = 4
PATTERNS = {
    "two images": "T T I T I T T",
    "no image": "T T T T",
    "image first": "I T T T",
    "more tokens than media": "I T I T I T I T",
    "adjacent images": "T I I T",
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param, "reference"):  # the metadata has no such kernel
        yield request.param


def _locations(*patterns: str) -> Tensor:
    rows = [[c == "I" for c in p.split()] for p in patterns]
    longest = max(map(len, rows))
    return torch.tensor([row + [False] * (longest - len(row)) for row in rows])


def _published(locations: Tensor, num_media: int, immediate: bool, cached: bool) -> Tensor:
    """Attention weights [B, T, num_media * LATENTS] for equal scores, by the published masking, written out densely."""
    time = locations.sum(1, keepdim=True).expand_as(locations) if cached else locations.cumsum(1)
    media_time = torch.arange(num_media).repeat_interleave(LATENTS) + 1
    compare = torch.eq if immediate else torch.ge
    visible = compare(time[..., None], media_time)
    weights = torch.where(visible, 0.0, -torch.finfo(torch.float32).max).softmax(-1)
    return weights.masked_fill((time == 0)[..., None], 0.0) if immediate else weights


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", ["last", "all_previous"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("num_media", [1, 2, 3])
def test_intervals_are_the_published_mask(pattern: str, mode: str, cached: bool, num_media: int) -> None:
    locations = _locations(PATTERNS[pattern], "T I T")
    found = media_intervals(locations, LATENTS, num_media=num_media, media_mode=mode, use_cached_media=cached)
    expected = _published(locations, num_media, mode == "last", cached)
    keys = torch.arange(locations.shape[0] * num_media * LATENTS)
    seen = (keys >= found.lo[:, None]) & (keys < found.hi[:, None])
    weights = seen / seen.sum(1, keepdim=True).clamp(min=1)
    per_sample = weights.view(*locations.shape, locations.shape[0], num_media * LATENTS)
    own = torch.stack([per_sample[b, :, b] for b in range(locations.shape[0])])
    torch.testing.assert_close(own, expected.to(own))
    assert (per_sample > 0).sum() == (own > 0).sum()  # nobody sees another sample's media


def test_rows_averaged_by_the_published_code_are_marked_uniform() -> None:
    last = media_intervals(_locations(PATTERNS["more tokens than media"]), LATENTS, num_media=2)
    assert last.uniform.tolist() == [False] * 4 + [True] * 4
    before = media_intervals(
        _locations(PATTERNS["two images"]), LATENTS, num_media=2, media_mode="all_previous"
    )
    assert before.uniform.tolist() == [True] * 2 + [False] * 5
    assert not last.without_uniform().uniform.any()
    assert (last.without_uniform().hi[4:] == last.without_uniform().lo[4:]).all()


def test_otter_may_show_text_the_image_after_it() -> None:
    found = media_intervals(_locations("T I T T I T"), LATENTS, num_media=2, attend_previous=False)
    assert found.lo.tolist()[:5] == [0, 0, 4, 4, 4]
    assert found.hi.tolist() == [4, 4, 8, 8, 8, 0]  # after the last image there is no next one: empty


def test_cached_media_may_have_another_number_of_rows() -> None:
    found = media_intervals(_locations("T I T I"), LATENTS, num_media=3, use_cached_media=True, rows=2)
    assert (found.lo.tolist(), found.hi.tolist()) == ([4, 4], [8, 8])


def _block(width: int = 16, gate: float = 0.5) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    tensors = {"x": torch.randn(7, width), "k": torch.randn(8, 2, 8), "v": torch.randn(8, 2, 8)}
    weights = {
        "norm_weight": torch.rand(width) + 0.5,
        "norm_bias": torch.randn(width),
        "w_q": torch.randn(16, width),
    }
    weights |= {"w_o": torch.randn(width, 16), "gate": torch.tensor([gate])}
    intervals = media_intervals(_locations(PATTERNS["two images"]), LATENTS, num_media=2)
    tensors |= {"lo": intervals.lo, "hi": intervals.hi}
    return tensors, {**weights, "heads": 2}


def test_a_closed_gate_returns_the_input_and_still_learns(backend: str) -> None:
    tensors, weights = _block(gate=0.0)
    weights["gate"].requires_grad_()
    tensors["x"].requires_grad_()
    y = gated_cross_attention(**tensors, **weights)
    assert torch.equal(y, tensors["x"])
    dx, dgate = torch.autograd.grad(y.square().sum(), (tensors["x"], weights["gate"]))
    assert dgate.abs().item() > 0 and torch.equal(dx, 2 * y)


def test_text_before_any_image_passes_unchanged(backend: str) -> None:
    tensors, weights = _block()
    y = gated_cross_attention(**tensors, **weights)
    assert torch.equal(y[:2], tensors["x"][:2]) and not torch.equal(y[2:], tensors["x"][2:])


def test_a_later_image_does_not_leak_into_earlier_text(backend: str) -> None:
    tensors, weights = _block()
    y = gated_cross_attention(**tensors, **weights)
    tensors["k"][4:] += 1
    tensors["v"][4:] -= 3
    changed = gated_cross_attention(**tensors, **weights)
    assert torch.equal(changed[:4], y[:4]) and not torch.equal(changed[4:], y[4:])


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_media_that_no_row_sees_change_no_bit(backend: str, poison: float) -> None:
    tensors, weights = _block()
    tensors["hi"] = torch.minimum(tensors["hi"], torch.tensor(4, dtype=torch.int32))
    tensors["lo"] = torch.minimum(tensors["lo"], tensors["hi"])
    found = []
    for fill in (0.0, poison):
        tensors["k"][4:], tensors["v"][4:] = fill, fill
        leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        y = gated_cross_attention(**leaves, **weights)
        grads = torch.autograd.grad(y.square().sum(), (leaves["x"], leaves["k"], leaves["v"]))
        found.append([y.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mean", [1e2, 1e3])
def test_rows_far_from_zero_keep_their_digits(backend: str, mean: float) -> None:
    tensors, weights = _block()
    tensors["x"] = tensors["x"] + mean
    with using("reference"):
        wide = {
            n: t.double() if t.is_floating_point() else t
            for n, t in (tensors | weights).items()
            if n != "heads"
        }
        exact = gated_cross_attention(**wide, heads=2)
    y = gated_cross_attention(**tensors, **weights)
    assert (y.double() - exact).abs().max() <= 4e-7 * mean * 16


_BAD = {
    "heads": ({"heads": 3}, "heads: got 3 with w_q of 16 rows and k of 2 heads of width 8"),
    "gate": ({"gate": torch.ones(3)}, r"gate: got shape \(3,\), expected \[1\] or \[16\]"),
    "norm": ({"norm": "batch"}, "norm: got 'batch', expected one of 'layer', 'rms'"),
    "w_o": ({"w_o": torch.ones(16, 8)}, r"w_o: got shape \(16, 8\), expected \[C, N\] with N = 16"),
    "lo": ({"lo": torch.zeros(3, dtype=torch.int32)}, r"lo: got shape \(3,\), expected \[R\] with R = 7"),
}


@pytest.mark.parametrize("what", _BAD)
def test_bad_arguments_are_named(what: str) -> None:
    change, message = _BAD[what]
    tensors, weights = _block()
    with pytest.raises(ValueError, match=message):
        gated_cross_attention(**{**tensors, **weights, **change})


def test_feed_forward_names_its_bad_arguments() -> None:
    x, weights = torch.ones(2, 4), {"norm_weight": torch.ones(4), "norm_bias": None, "gate": torch.ones(1)}
    with pytest.raises(
        ValueError, match="w_in: got 8 rows for w_out of 8 columns, expected twice as many with 'swiglu'"
    ):
        gated_feed_forward(x, w_in=torch.ones(8, 4), w_out=torch.ones(4, 8), activation="swiglu", **weights)
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        gated_feed_forward(x, w_in=torch.ones(8, 4), w_out=torch.ones(4, 8), activation="tanh", **weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"media_locations": torch.ones(2, 3)},
            TypeError,
            "media_locations: got torch.float32, expected torch.bool",
        ),
        ({"media_locations": torch.ones(3, dtype=torch.bool)}, ValueError, r"expected 2 dimensions \[B, T\]"),
        ({"latents": 0}, ValueError, "latents: got 0"),
        ({"num_media": -1}, ValueError, "num_media: got -1"),
        (
            {"media_mode": "next"},
            ValueError,
            "media_mode: got 'next', expected one of 'last', 'all_previous'",
        ),
        ({"rows": 5}, ValueError, "rows: got 5, expected 3"),
    ],
)
def test_media_intervals_names_its_bad_arguments(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"media_locations": torch.ones(2, 3, dtype=torch.bool), "latents": 4, "num_media": 2} | change
    with pytest.raises(error, match=message):
        media_intervals(**arguments)


def test_intervals_are_a_plain_tuple() -> None:
    lo, hi, uniform = media_intervals(_locations("I T"), LATENTS, num_media=1)
    assert isinstance(Intervals(lo, hi, uniform), tuple) and lo.dtype == hi.dtype == torch.int32
