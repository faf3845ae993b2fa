"""The edges of attention from few latents to long media."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import explain, latent_attention, using
from mmkernels.ops.resampler import composed
from mmkernels.ops.resampler.op import FORWARD
from mmkernels.primitives._op import OPS

BACKENDS = [
    row.backend
    for row in OPS["latent_attention"].rows["cpu"]
    if not row.present() and row.backend != "triton"
]
LENGTHS = (36, 0, 54)  # of media: alone, they are read by absorbed queries


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _layer(lengths: tuple[int, ...] = LENGTHS, own: bool = True, latents: int = 4) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) / math.sqrt(shape[-1])

    weights = {
        "w_q": draw(16, 12),
        "w_kv": draw(32, 20),
        "w_o": draw(12, 16),
        "b_q": draw(16),
        "b_kv": draw(32),
        "b_o": draw(12),
    }
    edges = torch.tensor((0, *lengths)).cumsum(0).int()
    x = {"latents": draw(len(lengths), latents, 12), "media": 4 * draw(sum(lengths), 20), "cu_seqlens": edges}
    return {**x, **weights, "w_self": draw(32, 12) if own else None, "heads": 2}


def _leaves(x: dict[str, Any]) -> dict[str, Any]:
    floating = (n for n, t in x.items() if isinstance(t, Tensor) and t.is_floating_point())
    return {**x, **{name: x[name].detach().clone().requires_grad_() for name in floating}}


def _run(x: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    x = _leaves(x)
    out = latent_attention(**x)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    return out.detach(), {
        name: t.grad for name, t in x.items() if isinstance(t, Tensor) and t.grad is not None
    }


@pytest.mark.parametrize("own", [False, True])
def test_ragged_media_are_images_read_one_by_one(backend: str, own: bool) -> None:
    x = _layer(own=own)
    out, grads = _run(x)
    start = 0
    for n, length in enumerate(LENGTHS):
        part = x["media"][start : start + length]
        one = {**x, "latents": x["latents"][n : n + 1], "media": part[None], "cu_seqlens": None}
        alone, alone_grads = _run(one)
        torch.testing.assert_close(out[n], alone[0])
        torch.testing.assert_close(grads["media"][start : start + length], alone_grads["media"][0])
        torch.testing.assert_close(grads["latents"][n], alone_grads["latents"][0])
        start += length


def test_an_image_without_media_gives_the_bias(backend: str) -> None:
    x = _layer(own=False)
    out, grads = _run(x)
    assert torch.equal(out[1], x["b_o"].expand(4, -1)) and not grads["latents"][1].any()
    assert torch.equal(_run({**x, "b_o": None})[0][1], torch.zeros(4, 12))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("own", [False, True])
def test_one_image_s_values_never_reach_another(backend: str, own: bool, poison: float) -> None:
    x = _layer(own=own)
    out, grads = _run(x)
    x["media"][: LENGTHS[0]] = poison
    leaves = _leaves(x)
    found = latent_attention(**leaves)
    assert isinstance(found, Tensor)
    bad = found[1:]
    bad.square().sum().backward()
    assert torch.equal(bad, out[1:])
    assert torch.equal(leaves["media"].grad[LENGTHS[0] :], grads["media"][LENGTHS[0] :])
    assert torch.equal(leaves["latents"].grad[1:], grads["latents"][1:])


@pytest.mark.parametrize("own", [False, True])
def test_shared_latents_are_the_same_latents_for_all(backend: str, own: bool) -> None:
    x = _layer(own=own)
    x["latents"] = x["latents"][0]
    out, grads = _run(x)
    apart, apart_grads = _run({**x, "latents": x["latents"].expand(3, -1, -1)})
    torch.testing.assert_close(out, apart)
    torch.testing.assert_close(grads.pop("latents"), apart_grads.pop("latents").sum(0))
    torch.testing.assert_close(grads, apart_grads)


@pytest.mark.parametrize("lengths", [(600, 0, 3, 800), None])
def test_media_read_in_pieces_give_the_same(
    lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cpp" not in BACKENDS:
        pytest.skip("pieces belong to compiled backends")
    x = _layer(lengths or (512, 512), latents=8)  # as many as a head is wide: keys and values are made
    if lengths is None:
        x.update(media=x["media"].view(2, 512, 20), cu_seqlens=None)
    attended: list[int] = []  # pieces, in every call of the kernel
    attend = composed._forward
    monkeypatch.setattr(
        composed, "_forward", lambda c, run, *a: attended.append(run.pieces) or attend(c, run, *a)
    )
    for own in (x["w_self"], None):
        whole = _run({**x, "w_self": own})
        assert attended and set(attended) == {1}
        monkeypatch.setattr(composed, "pieces", lambda z, device: 3)
        cut = _run({**x, "w_self": own})
        monkeypatch.setattr(composed, "pieces", lambda z, device: 1)
        assert 3 in attended
        attended.clear()
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


def test_a_gpu_gets_as_many_pieces_as_it_needs() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    long = composed.Sizes(images=1, latents=64, heads=8, width=64, tokens=16_384)
    assert (composed.pieces(long, gpu), composed.pieces(long, cpu)) == (33, 1)
    assert composed.pieces(long._replace(tokens=256), gpu) == 1
    assert composed.pieces(long._replace(images=32, tokens=32 * 2048), gpu) == 2


def test_the_form_is_chosen_by_size() -> None:
    for lengths, own, latents, kept in ((LENGTHS, False, 4, 3), (LENGTHS, True, 4, 4), ((6, 9), False, 4, 4)):
        x = _layer(lengths, own, latents)
        weights = (x.get(n) for n in ("w_q", "b_q", "w_kv", "b_kv", "w_self", "b_self", "w_o", "b_o"))
        made = FORWARD(x["latents"], x["media"], x["cu_seqlens"], *weights, len(lengths), 2)[2]
        assert made.dim() == kept  # probabilities, or keys and values


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("own", [False, True])
def test_weights_of_attention_can_be_seen(backend: str, own: bool, tokens: int) -> None:
    x = _layer((tokens, tokens), own=own)
    x.update(media=x["media"].view(2, tokens, 20), cu_seqlens=None)
    out, weights = latent_attention(**x, return_weights=True)
    values = torch.nn.functional.linear(x["media"], x["w_kv"], x["b_kv"])[..., 16:]
    if own:
        values = torch.cat([values, torch.nn.functional.linear(x["latents"], x["w_self"])[..., 16:]], 1)
    o = torch.einsum("nhlj,njhd->nlhd", weights, values.unflatten(-1, (2, 8)))
    torch.testing.assert_close(torch.nn.functional.linear(o.flatten(2), x["w_o"], x["b_o"]), out)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4))


def test_media_that_need_no_gradient_cost_none(backend: str) -> None:
    x = _leaves(_layer())
    x["media"].requires_grad_(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        latent_attention(**x).sum().backward()  # type: ignore[union-attr]
    frozen = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
    x["media"].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        latent_attention(**x).sum().backward()  # type: ignore[union-attr]
    assert frozen < sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
    assert x["latents"].grad is not None and x["media"].grad is not None


def test_autocast_takes_its_dtype(backend: str) -> None:
    x = _layer()
    low = {n: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in x.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = latent_attention(**x)
    assert torch.equal(found, latent_attention(**low))  # type: ignore[arg-type]


_EDGES = "cu_seqlens: got .*, expected to rise from 0 to media's 90 tokens"
_BAD_LAYERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": torch.tensor([0, 9, 6, 90], dtype=torch.int32)}, ValueError, _EDGES),
    ({"cu_seqlens": torch.tensor([0, 6, 6, 91], dtype=torch.int32)}, ValueError, _EDGES),
    ({"cu_seqlens": torch.tensor([0, 6, 6, 89], dtype=torch.int32)}, ValueError, _EDGES),
    ({"cu_seqlens": torch.tensor([1, 6, 6, 90], dtype=torch.int32)}, ValueError, _EDGES),
    (
        {"cu_seqlens": torch.tensor([0, 6, 90], dtype=torch.int32)},
        ValueError,
        "got 3 edges, expected 4 edges around 3 images",
    ),
    (
        {"cu_seqlens": torch.tensor([0, 6, 6, 90])},
        TypeError,
        "cu_seqlens: got torch.int64, expected torch.int32",
    ),
    ({"cu_seqlens": None}, ValueError, r"media: got shape \(90, 20\), expected 3 dimensions \[N, M, Cm\]"),
    ({"heads": 3}, ValueError, "heads: got 3, expected a positive divisor of w_q's 16 rows"),
    ({"w_q": torch.ones(16, 11)}, ValueError, r"w_q: got shape \(16, 11\)"),
    ({"w_kv": torch.ones(16, 20)}, ValueError, r"w_kv: got shape \(16, 20\)"),
    ({"b_o": torch.ones(11)}, ValueError, r"b_o: got shape \(11,\), expected \[Co\] with Co = 12"),
    ({"w_self": None, "b_self": torch.ones(32)}, ValueError, "b_self: got a bias without w_self"),
    ({"media": torch.ones(90, 20, dtype=torch.float64)}, TypeError, "media: got torch.float64"),
    ({"return_weights": True}, ValueError, "return_weights: got True with cu_seqlens"),
]


@pytest.mark.parametrize(("change", "error", "message"), _BAD_LAYERS)
def test_latent_attention_names_its_bad_arguments(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        latent_attention(**{**_layer(), **change})


def test_explain_says_who_would_run() -> None:
    rows = explain(latent_attention, **_layer())
    assert [row[:2] for row in rows][-1] == ("latent_attention", "reference") and len(rows) == len(BACKENDS)
