"""Attention of packed slices on CPU: the interval kernel over each slice by itself, slices of one length at a time.

So a slice's sums start at its own first key, whatever stands before it, and its output has the bits it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import attention
from mmkernels.primitives.interval_attention.op import kernel_head_dim

KERNELS = ("interval_attention__cpu", "interval_attention_backward__cpu")


class Run(NamedTuple):
    """`count` neighbouring slices of `length` rows each, from row `start` on."""

    start: int
    count: int
    length: int

    def rows(self, x: Tensor) -> Tensor:
        """x [T, ...] -> [count, length, ...], a view."""
        return x[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))

    def heads(self, lse: Tensor) -> Tensor:
        """[H, T] -> [count, H, length]."""
        return lse[:, self.start : self.start + self.count * self.length].unflatten(
            1, (self.count, self.length)
        ).transpose(0, 1)  # fmt: skip

    def intervals(self) -> tuple[Tensor, Tensor]:
        lo = torch.zeros(self.count, self.length, dtype=torch.int32)
        return lo, torch.full_like(lo, self.length)


def runs(offsets: Tensor) -> Iterator[Run]:
    """Slices without rows are in none."""
    found: Run | None = None
    for start, stop in pairwise(offsets.tolist()):
        if start == stop:
            continue
        if found is not None and found.length == stop - start:
            found = found._replace(count=found.count + 1)
            continue
        if found is not None:
            yield found
        found = Run(start, 1, stop - start)
    if found is not None:
        yield found


def _kernel(index: int) -> torch._ops.OpOverload:
    return getattr(torch.ops.mmkernels, KERNELS[index]).default


def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The operator slice_attention."""
    t, h, _ = q.shape
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty((h, t), dtype=torch.float32)
    for run in runs(offsets):
        part, sums = _kernel(0)(*map(run.rows, (q, k, v)), *run.intervals(), None, None, None, scale, 0.0)
        if run.count * run.length == t:
            out = part.flatten(0, 1)
        else:
            run.rows(out).copy_(part)
        run.heads(lse).copy_(sums)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The operator slice_attention_backward."""
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for run in runs(offsets):
        rows = map(run.rows, (q, k, v, out))
        found = _kernel(1)(
            run.rows(dout),
            None,
            *rows,
            run.heads(lse).contiguous(),
            *run.intervals(),
            None,
            None,
            None,
            scale,
            0.0,
        )
        for grad, part in zip(grads, found, strict=True):
            run.rows(grad).copy_(part)
    return tuple(grads)


def present() -> str:
    """Rows of this room on CPU come and go together: without compiled kernels the laws alone run."""
    missing = [
        n for n in KERNELS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{n}", "CPU")
    ]
    return f"{missing[0]} is not compiled in this installation" if missing else ""


attention.FORWARD.register("cpu", "cpp", forward, supports=lambda q, *_: kernel_head_dim(q), present=present)
attention.BACKWARD.register(
    "cpu", "cpp", backward, supports=lambda dout, q, *_: kernel_head_dim(q), present=present
)
