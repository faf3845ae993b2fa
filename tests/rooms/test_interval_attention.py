"""What the interval attention table cannot say in numbers: exact zeros, poison, merging, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import interval_attention, merge_attention, using
from mmkernels.primitives._op import OPS
from mmkernels.primitives.interval_attention.reference import dropout_keep

BACKENDS = [
    row.backend
    for row in OPS["interval_attention"].rows["cpu"]
    if not row.present() and row.backend != "triton"
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _qkv(rows: int, keys: int, heads: int = 2, width: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, width, generator=generator).requires_grad_() for n in (rows, keys, keys)]


def test_an_empty_row_is_exactly_zero_and_gives_no_gradient(backend: str) -> None:
    q, k, v = _qkv(3, 5)
    out, lse = interval_attention(q, k, v, _int(0, 2, 5), _int(0, 4, 5), return_lse=True)  # type: ignore[misc]
    assert torch.equal(out[[0, 2]], torch.zeros_like(out[[0, 2]]))
    assert (lse[[0, 2]] == -math.inf).all() and lse[1].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dq[[0, 2]].any() and not dk[[0, 1, 4]].any() and not dv[[0, 1, 4]].any()
    alone = interval_attention(q[1:2], k, v, _int(2), _int(4))
    torch.testing.assert_close(out[1:2], alone)


def test_all_rows_empty(backend: str) -> None:
    q, k, v = _qkv(3, 5)
    out = interval_attention(q, k, v, _int(0, 3, 5), _int(0, 3, 5))
    grads = torch.autograd.grad(out.sum(), (q, k, v))  # type: ignore[union-attr]
    assert not out.any() and not any(g.any() for g in grads)  # type: ignore[union-attr]


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_keys_that_no_row_sees_change_no_bit(backend: str, poison: float) -> None:
    lo, hi = _int(3, 3, 70, 70), _int(9, 65, 80, 71)
    unseen = torch.ones(90, dtype=torch.bool)
    unseen[3:65], unseen[70:80] = False, False
    clean: list[Tensor] = []
    for fill in (0.0, poison):
        q, k, v = (x.detach().clone() for x in _qkv(4, 90))
        k[unseen], v[unseen] = fill, fill
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = interval_attention(*leaves, lo, hi, return_lse=True)  # type: ignore[misc]
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
        assert not grads[1][unseen].any() and not grads[2][unseen].any()
        found = [out.detach(), lse.detach(), *grads]
        assert not clean or all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
        clean = found


def test_a_uniform_row_averages_values_and_teaches_only_them(backend: str) -> None:
    q, k, v = _qkv(2, 6)
    with torch.no_grad():
        q[0] = math.nan
    uniform = torch.tensor([True, False])
    out, lse = interval_attention(q, k, v, _int(1, 0), _int(5, 6), uniform=uniform, return_lse=True)  # type: ignore[misc]
    torch.testing.assert_close(out[0], v[1:5].mean(0))
    torch.testing.assert_close(lse[0], torch.full((2,), math.log(4)))
    dq, dk, dv = torch.autograd.grad(out[0].sum() + lse[0].sum(), (q, k, v))
    assert not dq.any() and not dk.any()
    torch.testing.assert_close(dv[1:5], torch.full((4, 2, 16), 0.25))


def test_merging_runs_equals_one_run(backend: str) -> None:
    q, k, v = _qkv(4, 20)
    whole, lse = interval_attention(q, k, v, _int(0, 3, 5, 9), _int(20, 20, 5, 12), return_lse=True)  # type: ignore[misc]
    cuts = [(_int(0, 3, 5, 9), _int(7, 3, 5, 10)), (_int(7, 3, 5, 10), _int(20, 20, 5, 12))]
    parts = [interval_attention(q, k, v, *cut, return_lse=True) for cut in cuts]
    out, merged = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(merged, lse)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(whole.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_dropout_keeps_what_the_hash_keeps(backend: str) -> None:
    rows, keys, heads, p = 5, 70, 2, 0.3
    q, k, _ = _qkv(rows, keys, heads)
    seed = torch.tensor([2**40 + 12345])
    v = torch.zeros(keys, heads, 72)
    v[torch.arange(keys), :, torch.arange(keys)] = 1.0  # the output spells out the probabilities
    q, k = (torch.nn.functional.pad(x, (0, 56)) for x in (q, k))
    lo, hi = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), keys, dtype=torch.int32)
    plain = interval_attention(q, k, v, lo, hi)
    dropped = interval_attention(q, k, v, lo, hi, dropout_p=p, seed=seed)
    keep = dropout_keep(seed, p, (1, heads, rows, keys))[0].transpose(0, 1)
    torch.testing.assert_close(dropped[..., :keys], plain[..., :keys] * keep / (1 - p))  # type: ignore[index]
    assert 0.6 < keep.float().mean() < 0.8


def test_the_strided_form_reads_a_cache_in_place(backend: str) -> None:
    cache = torch.randn(2, 4, 64, 16)  # [B, G, capacity, D]: 10 and 7 valid keys, the rest is garbage
    cache[0, :, 10:], cache[1, :, 7:] = math.nan, math.nan
    q = torch.randn(2, 8, 3, 16)
    lo, hi = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([[8, 9, 10], [5, 6, 7]], dtype=torch.int32)
    out = interval_attention(q, cache, cache, lo, hi)
    for b, t in itertools.product(range(2), range(3)):
        n = int(hi[b, t])
        flat = [x[b].transpose(0, 1) for x in (q[:, :, t : t + 1], cache[:, :, :n], cache[:, :, :n])]
        one = interval_attention(*flat, _int(0), _int(n))  # type: ignore[arg-type]
        torch.testing.assert_close(out[b, :, t], one[0])  # type: ignore[index]


def test_rows_do_not_depend_on_their_neighbours(backend: str) -> None:
    q, k, v = (x.detach() for x in _qkv(40, 200))
    lo = torch.arange(40, dtype=torch.int32) * 3
    hi = lo + 50
    out = interval_attention(q, k, v, lo, hi)
    q[20:], k[113:], v[113:] = 5.0, 7.0, 9.0  # rows 0..19 end at 19 * 3 + 50 = 107
    torch.testing.assert_close(interval_attention(q, k, v, lo, hi)[:20], out[:20], rtol=0, atol=0)  # type: ignore[index]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do(backend: str, shape: tuple[int, int]) -> None:
    q, k, v = _qkv(*shape)
    lo = torch.zeros(shape[0], dtype=torch.int32)
    out = interval_attention(q, k, v, lo, lo)
    assert out.shape == q.shape and not out.any()  # type: ignore[union-attr]
    assert all(
        g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True)
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(("lo", "hi"), [((0, 3), (4, 2)), ((0, -1), (4, 4)), ((0, 0), (4, 6))])
def test_intervals_outside_the_keys_raise_on_cpu(
    backend: str, lo: tuple[int, int], hi: tuple[int, int]
) -> None:
    q, k, v = _qkv(2, 5)
    with pytest.raises(ValueError, match=r"lo, hi: row 1 has .*expected 0 <= lo <= hi <= 5 keys"):
        interval_attention(q, k, v, _int(*lo), _int(*hi))


_BAD = {
    "a rank": (
        lambda a: a | {"k": a["k"][0]},
        ValueError,
        r"k: got shape \(2, 16\), expected 3 dimensions \[Tk, G, D\]",
    ),
    "a width": (lambda a: a | {"k": a["k"][..., :8]}, ValueError, r"k: got shape .* with D = 16"),
    "a length": (
        lambda a: a | {"hi": a["hi"][:2]},
        ValueError,
        r"hi: got shape \(2,\), expected \[Tq\] with Tq = 3",
    ),
    "a head count": (
        lambda a: a | {"q": torch.randn(3, 3, 16)},
        ValueError,
        "k: got 2 heads, expected a divisor of q's 3",
    ),
    "a dtype": (
        lambda a: a | {"v": a["v"].double()},
        TypeError,
        "v: got torch.float64, expected torch.float32 like q",
    ),
    "long intervals": (
        lambda a: a | {"lo": a["lo"].long()},
        TypeError,
        "lo: got torch.int64, expected torch.int32",
    ),
    "a device": (
        lambda a: a | {"k": a["k"].to("meta")},
        TypeError,
        "k: got device meta, expected cpu like q",
    ),
    "no tensor": (lambda a: a | {"q": [1.0]}, (TypeError, AttributeError), "q|list"),
    "dropout without seed": (lambda a: a | {"dropout_p": 0.1}, ValueError, "seed: got None"),
    "dropout of one": (
        lambda a: a | {"dropout_p": 1.0},
        ValueError,
        "dropout_p: got 1.0, expected 0 <= p < 1",
    ),
    "slopes": (lambda a: a | {"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: got shape \(3,\)"),
}


@pytest.mark.parametrize("what", _BAD)
def test_bad_arguments_are_named(what: str) -> None:
    change, error, message = _BAD[what]
    q, k, v = (x.detach() for x in _qkv(3, 5))
    arguments = {"q": q, "k": k, "v": v, "lo": _int(0, 0, 0), "hi": _int(1, 2, 3)}
    with pytest.raises(error, match=message):
        interval_attention(**change(arguments))
