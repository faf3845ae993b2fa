"""Interval attention on lists that nobody would write by hand, and on sequences whose dense scores would not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import interval_attention, using
from mmkernels.primitives._op import OPS

COMPILED = [
    row.backend for row in OPS["interval_attention"].rows["cpu"] if row.backend == "cpp" and not row.present()
]
needs_cpp = pytest.mark.skipif(not COMPILED, reason="the C++ kernels are not compiled here")


@st.composite
def _problem(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Any heads, widths, row and key counts; intervals in any order, empty and uniform ones among them."""
    rows, keys = draw(st.integers(1, 90)), draw(st.integers(1, 200))
    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    width = 8 * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ends = torch.randint(0, keys + 1, (2, rows), generator=generator, dtype=torch.int32).sort(0).values
    if draw(st.booleans()):  # a whole block of rows with the same interval, as images give
        ends[:, : rows // 2] = ends[:, :1]
    return {
        "q": torch.randn(rows, groups * per_group, width, generator=generator),
        "k": torch.randn(keys, groups, width, generator=generator),
        "v": torch.randn(keys, groups, width, generator=generator),
        "lo": ends[0],
        "hi": ends[1],
        "uniform": torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3])),
    }


def _run(problem: dict[str, torch.Tensor], backend: str) -> list[torch.Tensor]:
    leaves = [problem[n].clone().requires_grad_() for n in "qkv"]
    with using(backend):
        out, lse = interval_attention(
            *leaves, problem["lo"], problem["hi"], uniform=problem["uniform"], return_lse=True
        )  # type: ignore[misc]
        loss = out.square().sum() + torch.where(lse == -torch.inf, 0, lse).sin().sum()
        grads = torch.autograd.grad(loss, leaves)
    return [out.detach(), lse.detach(), *grads]


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(_problem())
def test_any_list_of_intervals_agrees_with_the_law(problem: dict[str, torch.Tensor]) -> None:
    for ours, law in zip(_run(problem, "cpp"), _run(problem, "reference"), strict=True):
        torch.testing.assert_close(ours, law, rtol=2e-4, atol=2e-4)


@needs_cpp
@settings(max_examples=10, deadline=None)
@given(_problem())
def test_the_number_of_threads_changes_no_bit(problem: dict[str, torch.Tensor]) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_run(problem, "cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


_LONG = """
import resource, torch, mmkernels
torch.set_num_threads(1)
T, images, latents = 16384, 256, 64
q = torch.randn(T, 2, 64, requires_grad=True)
k = torch.randn(images * latents, 2, 64, requires_grad=True)
lo = (torch.arange(T) * images // T * latents).int()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = mmkernels.interval_attention(q, k, k, lo, lo + latents)
out.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@needs_cpp
def test_no_tensor_of_rows_times_keys_exists() -> None:
    """256 images and 16,384 rows: the scores alone would take 2 GiB; 48 MiB are inputs, output and gradients."""
    grown = int(
        subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, check=True).stdout
    )
    assert grown < 160 * 1024, f"{grown} KiB"
