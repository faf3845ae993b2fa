"""The dispatcher's table: forced backends, explanations, autocast, and what a torch user may expect of an op."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import mmkernels
from mmkernels import using
from mmkernels.primitives._op import OPS


def _attention(dtype: torch.dtype = torch.float32, width: int = 8) -> tuple[torch.Tensor, ...]:
    q = torch.randn(4, 2, width, dtype=dtype)
    lo = torch.zeros(4, dtype=torch.int32)
    return q, q.clone(), q.clone(), lo, lo + 4


def test_a_forced_backend_is_honoured_or_raises() -> None:
    with using("cuda"), pytest.raises(RuntimeError, match=r"cannot run as asked by using\(cuda\)"):
        mmkernels.interval_attention(*_attention())
    with using("cpp"), pytest.raises(RuntimeError, match=r"head width 20|not compiled"):
        mmkernels.interval_attention(*_attention(width=20))
    with using("cuda", "reference"):
        mmkernels.interval_attention(*_attention())


def test_using_restores_the_choice_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), using("cuda"):
        raise ZeroDivisionError
    mmkernels.interval_attention(*_attention())


def test_using_reaches_other_threads() -> None:
    failures: list[str] = []

    def work() -> None:
        try:
            mmkernels.interval_attention(*_attention())
        except RuntimeError as error:
            failures.append(str(error))

    with using("cuda"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert failures and "cuda" in failures[0]


@pytest.mark.parametrize("names", [(), ("fast",), ("cpp", "fast")])
def test_unknown_backends_are_named(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected some of cuda, triton, cpp, reference"), using(*names):
        pass


def test_backends_says_why_not() -> None:
    for op, rows in mmkernels.backends("cpu").items():
        assert rows["reference"] == "", op
    assert set(mmkernels.backends("cuda")) == set(OPS)
    with pytest.raises(ValueError, match="device: got 'tpu'"):
        mmkernels.backends("tpu")


def test_explain_names_the_reason_and_computes_nothing() -> None:
    q = torch.full((2, 1, 20), float("nan"))
    lo = torch.tensor([5, 5], dtype=torch.int32)  # past the keys: would raise if it ran
    rows = mmkernels.explain(mmkernels.interval_attention, q, q, q, lo, lo)
    assert rows[-1] == ("interval_attention", "reference", "")
    assert all(reason for _, _, reason in rows[:-1])


def test_autocast_casts_operands_but_leaves_sums_wide() -> None:
    q, k, v, lo, hi = _attention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = mmkernels.interval_attention(q, k, v, lo, hi, return_lse=True)  # type: ignore[misc]
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    low = (x.bfloat16() for x in (q, k, v))
    plain, plain_lse = mmkernels.interval_attention(*low, lo, hi, return_lse=True)  # type: ignore[misc]
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_does_not_leak_into_an_op(backend: str | None) -> None:
    """A float32 product inside an op's body would come back in bfloat16: the residual stream must stay float32."""
    x = torch.randn(4, 16)
    weights = {"norm_weight": torch.ones(16), "norm_bias": torch.zeros(16), "gate": torch.ones(1)}
    w_in, w_out = torch.randn(32, 16).bfloat16(), torch.randn(16, 32).bfloat16()
    plain = mmkernels.gated_feed_forward(x, w_in=w_in, w_out=w_out, **weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mmkernels.gated_feed_forward(x, w_in=w_in, w_out=w_out, **weights)
    assert got.dtype == torch.float32 and torch.equal(got, plain)


def test_shapes_may_change_without_recompiling_more_than_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda *a: mmkernels.interval_attention(*a), backend=counter, fullgraph=True, dynamic=None
    )
    for rows in (4, 6, 9, 12, 17):
        q = torch.randn(rows, 2, 8)
        lo = torch.zeros(rows, dtype=torch.int32)
        compiled(q, q, q, lo, lo + rows)
    assert counter.frame_count <= 2


def test_exports_and_runs_in_the_exported_program() -> None:
    class Attend(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return mmkernels.interval_attention(*args)  # type: ignore[return-value, arg-type]

    args = _attention()
    program = torch.export.export(Attend(), args)
    assert torch.equal(program.module()(*args), Attend()(*args))


def test_vmap_gives_the_answer_of_a_loop() -> None:
    q, k, v, lo, hi = _attention()
    batched = torch.stack([q, q + 1])
    expected = torch.stack([mmkernels.interval_attention(b, k, v, lo, hi) for b in batched])  # type: ignore[arg-type]
    got = torch.vmap(lambda b: mmkernels.interval_attention(b, k, v, lo, hi))(batched)
    torch.testing.assert_close(got, expected)
