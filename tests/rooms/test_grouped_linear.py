"""What the grouped linear table cannot say in numbers: exact zeros, poison, order of sums, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import grouped_linear, using
from mmkernels.primitives._op import OPS

BACKENDS = [
    row.backend for row in OPS["grouped_linear"].rows["cpu"] if not row.present() and row.backend != "triton"
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


def test_rows_go_through_the_weight_of_their_group(backend: str) -> None:
    x, w = _draw(5, 6), _draw(3, 4, 6)
    out = grouped_linear(x, w, _int(2, 0, 3))
    torch.testing.assert_close(out, torch.cat([x[:2] @ w[0].T, x[2:] @ w[2].T]))


@pytest.mark.parametrize("rows", [8, 40])
def test_an_empty_group_has_gradients_of_exactly_zero(backend: str, rows: int) -> None:
    x, w, b = _draw(rows, 6), _draw(256, 4, 6), _draw(256, 4)
    counts = torch.zeros(256, dtype=torch.int32)
    counts[37], counts[255] = rows - 3, 3
    out = grouped_linear(x, w, counts, bias=b, activation="silu")
    dw, db = torch.autograd.grad(out.sum(), (w, b))
    empty = counts == 0
    assert not dw[empty].any() and not db[empty].any()
    assert dw[37].any() and dw[255].any() and dw.isfinite().all() and db.isfinite().all()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("size", [1, 9])
def test_rows_of_no_group_reach_nothing(backend: str, poison: float, size: int) -> None:
    """Past the counts, dropped, or gathered by nobody: no bit of anything changes with what they hold."""
    order = _int(*range(2 * size), 2 * size + 1, 2 * size)
    scatter = torch.cat([_int(-1), torch.arange(2 * size - 1, dtype=torch.int32), _int(-1, -1)])
    nobody = [0, 2 * size, 2 * size + 1]
    found: list[list[Tensor]] = []
    for fill in (0.0, poison):
        x, w, r, s = _draw(2 * size + 2, 6), _draw(2, 8, 6), _draw(2 * size + 2, 4), _draw(2 * size + 2)
        with torch.no_grad():
            x[nobody], s[nobody], r[2 * size - 1 :] = fill, fill, fill
        counts = _int(size, size)
        out = grouped_linear(
            x, w, counts, gather=order, scatter=scatter, residual=r, row_scale=s, activation="swiglu"
        )
        weight = torch.full_like(out, 1.5)
        weight[2 * size - 1 :] = fill
        grads = torch.autograd.grad(out, (x, w, r, s), weight)
        assert not out[2 * size - 1 :].any()
        assert (
            not grads[0][nobody].any() and not grads[2][2 * size - 1 :].any() and not grads[3][nobody].any()
        )
        found.append([out.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_neighbours_poison_stays_in_its_own_group(backend: str) -> None:
    x, w, b = _draw(6, 5), _draw(2, 4, 5), _draw(2, 4)
    with torch.no_grad():
        x[:3] = math.nan
    out = grouped_linear(x, w, _int(3, 3), bias=b)
    dx, dw, db = torch.autograd.grad(out[3:].sum(), (x, w, b))
    assert out[3:].isfinite().all() and dx[3:].isfinite().all() and dw[1].isfinite().all()
    torch.testing.assert_close(db[1], torch.full((4,), 3.0))


def test_rows_gathered_often_add_up_in_their_order(backend: str) -> None:
    """float32 sums that depend on their order: the gradient is the one of adding from the first row on."""
    w = torch.eye(4).unsqueeze(0)
    gather = _int(1, 1, 0, 1, 1, 1)
    dout = torch.tensor([1e8, 1.0, 3.0, -1e8, 1.0, 2.0]).unsqueeze(1).expand(6, 4)
    x = _draw(2, 4)
    (dx,) = torch.autograd.grad(grouped_linear(x, w, _int(6), gather=gather), x, dout)
    expected = torch.tensor(0.0)
    for value in (1e8, 1.0, -1e8, 1.0, 2.0):
        expected = expected + value
    assert torch.equal(dx[1], expected.expand(4)) and torch.equal(dx[0], torch.full((4,), 3.0))


def test_a_shared_weight_counts_all_groups_together(backend: str) -> None:
    x, w, b = _draw(7, 6), _draw(1, 4, 6), _draw(1, 4)
    out = grouped_linear(x, w, _int(2, 0, 3), bias=b)
    torch.testing.assert_close(out[:5], x[:5] @ w[0].T + b)
    assert not out[5:].any()


def test_lora_adds_to_the_rows_of_its_segments(backend: str) -> None:
    x, w, a, b = _draw(6, 8), _draw(1, 4, 8), _draw(2, 3, 8), _draw(2, 4, 3)
    out = grouped_linear(x, w, _int(6), lora=(a, b, _int(1, 3)))
    delta = out - x @ w[0].T
    torch.testing.assert_close(delta[:1], x[:1] @ a[0].T @ b[0].T)
    torch.testing.assert_close(delta[1:4], x[1:4] @ a[1].T @ b[1].T)
    torch.testing.assert_close(delta[4:], torch.zeros(2, 4))


def test_nothing_is_computed_for_a_frozen_weight() -> None:
    x, w = _draw(5, 6), _draw(2, 4, 6).detach()
    out = grouped_linear(x, w, _int(2, 3), activation="gelu")
    needs = [True, *[False] * 6]
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    grads = OPS["grouped_linear_backward"](torch.ones_like(out), *saved, "gelu", 5, needs)
    assert [g.numel() for g in grads] == [30, 0, 0, 0, 0, 0, 0]


def test_the_kept_product_is_optional(backend: str) -> None:
    """The operator called without `keep` has the same gradients: it computes the product again."""
    x, w, s = _draw(5, 6), _draw(2, 4, 6), _draw(5)
    rest = (None, None, None, s, None, None, None, None, "silu", 5)
    grads = [
        torch.autograd.grad(OPS["grouped_linear"](x, w, _int(2, 3), *rest, keep)[0].sum(), (x, w, s))
        for keep in (True, False)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_takes_its_dtype_and_keeps_a_wide_residual(backend: str) -> None:
    x, w, r = _draw(5, 6), _draw(2, 4, 6), _draw(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_linear(x, w, _int(2, 3), residual=r)
        plain = grouped_linear(x, w, _int(2, 3))
    assert out.dtype == torch.float32 and plain.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum() + plain.sum(), w)[0].dtype == torch.float32


def test_unknown_counts_run_on_fake_tensors() -> None:
    """No value is read by the host: the whole call traces where tensors have none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.randn(5, 6, device="cuda"), torch.randn(2, 8, 6, device="cuda")
        index = torch.empty(5, dtype=torch.int32, device="cuda")
        out = grouped_linear(
            x, w, torch.empty(2, dtype=torch.int32, device="cuda"),
            gather=index, scatter=index, activation="swiglu", residual=torch.randn(5, 4, device="cuda"),
        )  # fmt: skip
    assert out.shape == (5, 4)


_BAD = {
    "a width": ({"x": torch.ones(5, 7)}, ValueError, r"weight: got shape \(2, 4, 6\), expected .* with C = 7"),
    "counts": ({"counts": _int(1, 2, 3)}, ValueError, r"counts: got shape \(3,\), expected \[E\] with E = 2"),
    "too many": ({"counts": _int(3, 4)}, ValueError, "counts: got counts that add up to 7 .* at most the 5 rows"),
    "negative": ({"counts": _int(-1, 4)}, ValueError, "smallest of -1"),
    "gather": ({"gather": _int(0, 1, 2, 3, 5)}, ValueError, "gather: row 4 has index 5, expected 0 <= index < 5"),
    "before": ({"gather": _int(0, -1, 2, 3, 4)}, ValueError, "gather: row 1 has index -1"),
    "scatter": ({"scatter": _int(0, 1, 2, 3, 9)}, ValueError, "scatter: row 4 has index 9, expected -1 <= index < 5"),
    "twice": ({"scatter": _int(0, 1, 1, -1, -1)}, ValueError, "scatter: got 3 rows into 2 places"),
    "long": ({"counts": torch.tensor([2, 3])}, TypeError, "counts: got torch.int64, expected torch.int32"),
    "length": ({"scatter": _int(1, 2)}, ValueError, r"scatter: got shape \(2,\), expected \[5\]"),
    "name": ({"activation": "relu"}, ValueError, "activation: got 'relu', expected one of None, 'gelu'"),
    "residual": ({"residual": torch.ones(5, 3)}, ValueError, r"residual: got shape \(5, 3\), expected \[5, 4\]"),
    "odd": ({"weight": torch.ones(2, 3, 6), "activation": "swiglu"}, ValueError, "weight: got 3 rows, expected an even"),
    "dtype": ({"weight": torch.ones(2, 4, 6).double()}, TypeError, "weight: got torch.float64, expected torch.float32"),
    "no group": ({"weight": torch.ones(0, 4, 6), "counts": _int()}, ValueError, "expected at least one group"),
    "lora": (
        {"lora": (torch.ones(2, 3, 6), torch.ones(2, 4, 3), _int(4, 5))},
        ValueError,
        "lora: got counts that add up to 9",
    ),
    "rank": (
        {"lora": (torch.ones(2, 3, 6), torch.ones(2, 4, 2), _int(1, 1))},
        ValueError,
        r"lora_b: got shape \(2, 4, 2\), expected \[S, N, K\] with K = 3",
    ),
    "rows": ({"rows": -1}, ValueError, "rows: got -1"),
    "device": ({"counts": _int(2, 3).to("meta")}, TypeError, "counts: got device meta, expected cpu like x"),
}  # fmt: skip


@pytest.mark.parametrize("what", _BAD)
def test_bad_arguments_are_named(what: str) -> None:
    change, error, message = _BAD[what]
    arguments = {"x": torch.ones(5, 6), "weight": torch.ones(2, 4, 6), "counts": _int(2, 3)} | change
    with pytest.raises(error, match=message):
        grouped_linear(**arguments)


def test_rows_past_the_counts_may_hold_any_index(backend: str) -> None:
    x, w = _draw(5, 6), _draw(2, 4, 6)
    wild = _int(0, 1, 2, 99, -7)
    out = grouped_linear(x, w, _int(1, 2), gather=wild, scatter=wild)
    torch.testing.assert_close(out[:3], torch.cat([x[:1] @ w[0].T, x[1:3] @ w[1].T]))
    assert not out[3:].any()


def test_kernels_ignore_rows_outside(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, as on a GPU: such a row is of no group, and counts beyond the rows end with them."""
    monkeypatch.setattr(OPS["grouped_linear"], "_check", None)
    x, w = _draw(4, 6), _draw(2, 5, 6)
    gather, scatter = _int(0, 7, 2, 3), _int(0, 1, -3, 3)
    out = grouped_linear(x, w, _int(2, 9), gather=gather, scatter=scatter)
    assert torch.equal(out[[1, 2]], torch.zeros(2, 5))
    torch.testing.assert_close(out[[0, 3]], torch.stack([w[0] @ x[0], w[1] @ x[3]]))
    dx, dw = torch.autograd.grad(out.sum(), (x, w))
    assert not dx[[1, 2]].any() and dw.isfinite().all()
