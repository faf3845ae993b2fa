"""Grouped linear on CPU: a library product for each group of many rows, a kernel of ours for groups of few.

Rows that already stand together are multiplied where they are, and into where they belong; others are copied there and back.
Where the CPU has no units for a 16-bit dtype, weights are widened a block at a time, each block being in cache for all rows of
its group. The epilogue takes few rows at a time, which stay in cache between its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels.primitives._op import LIBRARY
from mmkernels.primitives._widen import operand_dtype
from mmkernels.primitives.grouped_linear import reference
from mmkernels.primitives.grouped_linear.rows import Piece, Rows, parts, pieces, place, plan

FEW = 128  # rows of a group that our kernel multiplies no slower than the library
CHUNK = 2048  # rows that go through a weight at once
EPILOGUE = 128  # rows
WIDE_BLOCK = 1 << 21  # elements of a weight that are widened at once

KERNEL = "grouped_rows__cpu"
LIBRARY.define(
    f"{KERNEL}(Tensor x, Tensor weight, Tensor counts, Tensor? index, int begin, int end, Tensor(a!) out) -> ()"
)


class Weights(NamedTuple):
    """The learned inputs, and the dtype that products sum and epilogues compute in."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    wide: torch.dtype


def weights_of(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Weights:
    return Weights(x, weight, *rest, torch.promote_types(x.dtype, torch.float32))  # type: ignore[arg-type]


def few_of(x: Tensor) -> int:
    return 0 if x.dtype == torch.float64 else FEW


def pick(x: Tensor, at: slice | Tensor, dtype: torch.dtype) -> Tensor:
    return (x[at] if isinstance(at, slice) else x.index_select(0, at)).to(dtype)


def put(x: Tensor, at: slice | Tensor, value: Tensor) -> None:
    if isinstance(at, slice):
        x[at].copy_(value)
    else:
        x.index_copy_(0, at, value.to(x.dtype))


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A weight [N, C] in blocks of rows, widened into one buffer: a fresh one would cost more than the widening."""
    n, c = weight.shape
    step = max(1, min(n, WIDE_BLOCK // max(c, 1)))
    buffer = weight.new_empty((step, c), dtype=dtype)
    for start in range(0, n, step):
        block = weight[start : start + step]
        yield slice(start, start + len(block)), buffer[: len(block)].copy_(block)


def multiply(a: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = a weight^T, a being in the product's dtype."""
    if a.dtype == weight.dtype == out.dtype:
        torch.mm(a, weight.t(), out=out)
        return
    if a.dtype == weight.dtype:
        out.copy_(torch.mm(a, weight.t()))
        return
    for rows, block in _blocks(weight, a.dtype):
        torch.mm(a, block.t(), out=out[:, rows])


def multiply_back(dy: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = dy weight."""
    if dy.dtype == weight.dtype == out.dtype:
        torch.mm(dy, weight, out=out)
        return
    if dy.dtype == weight.dtype:
        out.copy_(torch.mm(dy, weight))
        return
    for rows, block in _blocks(weight, dy.dtype):
        if rows.start == 0:
            torch.mm(dy[:, rows], block, out=out)
        else:
            out.addmm_(dy[:, rows], block)


def _product(
    w: Weights, rows: Rows, piece: Piece, index: tuple[Tensor, Tensor | None], target: Tensor | None
) -> Tensor:
    """The piece's rows times their groups' weights [m, N], wide, in `target` where that is given."""
    _, start, stop = piece
    found = target
    if found is None:
        found = w.x.new_empty((stop - start, w.weight.shape[1]), dtype=w.wide)
    if piece.group < 0:
        kernel = getattr(torch.ops.mmkernels, KERNEL).default
        kernel(w.x, w.weight, *index, start, stop, found)
    else:
        a = pick(w.x, place(rows.read, start, stop), operand_dtype(w.x))
        multiply(a, w.weight[piece.group], found)
    if w.bias is not None:
        for group, own in parts(rows.counts, start, stop):
            found[own] += w.bias[group]
    if w.lora_a is not None and w.lora_b is not None and rows.segments is not None:
        a = pick(w.x, place(rows.read, start, stop), w.wide)
        for s, own in parts(rows.segments, start, stop):
            t = a[own] @ w.lora_a[s].to(w.wide).t()
            found[own].addmm_(t, w.lora_b[s].to(w.wide).t())
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_counts: Tensor | None,
    activation: str,
    rows: int,
    keep: bool,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator grouped_linear: out, h. Given `into`, only the rows reached are written, to these."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    w = weights_of(x, weight, bias, lora_a, lora_b)
    kept = plan((x.shape[0], rows), counts, gather, scatter, lora_counts)
    m, n = x.shape[0] if gather is None else gather.shape[0], weight.shape[1]
    width = n // 2 if activation == "swiglu" else n
    if into is None:
        make = torch.empty if kept.used == rows else torch.zeros
        out = make((rows, width), dtype=x.dtype if residual is None else residual.dtype)
        h = (torch.empty if kept.used == m else torch.zeros)((m if keep else 0, n), dtype=x.dtype)
    else:
        out, h = into
    if kept.at is not None:  # not all rows are kept: what the kernel reads is no longer what the caller gave
        gather, counts = (torch.from_numpy(i.astype(np.int32)) for i in (kept.read, kept.counts))  # type: ignore[union-attr]
    index = (counts.contiguous(), gather if gather is None else gather.contiguous())
    for piece in pieces(kept, few_of(x), CHUNK):
        at, to = (place(i, piece.start, piece.stop) for i in (kept.at, kept.write))
        target = _target(h if keep else out, at if keep else to, w.wide, keep or not activation)
        p = _product(w, kept, piece, index, target)
        if keep and p is not target:
            put(h, at, p)
        if p is target and not keep and row_scale is None and residual is None:
            continue
        _finish(p, (out, to), (row_scale, at), residual, activation)
    return out, h


def _target(into: Tensor, at: slice | Tensor, wide: torch.dtype, whole: bool) -> Tensor | None:
    """The rows that a product may be written to at once."""
    return into[at] if whole and isinstance(at, slice) and into.dtype == wide else None


def _some(at: slice | Tensor, rows: slice) -> slice | Tensor:
    return (
        slice(at.start + rows.start, min(at.start + rows.stop, at.stop))
        if isinstance(at, slice)
        else at[rows]
    )


def _finish(
    p: Tensor,
    out: tuple[Tensor, slice | Tensor],
    scale: tuple[Tensor | None, slice | Tensor],
    residual: Tensor | None,
    activation: str,
) -> None:
    """out[to] = residual[to] + scale[at] activation(p), a few rows at a time."""
    for start in range(0, len(p), EPILOGUE):
        rows = slice(start, start + EPILOGUE)
        to = _some(out[1], rows)
        v = reference.activate(p[rows], activation)
        if scale[0] is not None:
            v = v * pick(scale[0], _some(scale[1], rows), v.dtype).unsqueeze(1)
        if residual is not None:
            v = v + pick(residual, to, v.dtype)
        put(out[0], to, v)
