"""The expert's linear map on CPU: the grouped product of each modality over its own rows, into one output.

Weights stay apart, as two parameters are: none is copied to stand beside the other, and one that has no rows is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.visual_expert import op
from mmkernels.primitives.grouped_linear import composed, composed_backward
from mmkernels.primitives.grouped_linear.reference import activate

TURNED = 64  # rows whose heads are turned at once: they stay in cache


class _Side(NamedTuple):
    """One modality: its number, its rows in group order, and the places these have in x and in out (None: the same)."""

    number: int
    own: slice
    counts: Tensor
    read: Tensor | None
    write: Tensor | None


def _sides(counts: Tensor, gather: Tensor | None, scatter: Tensor | None, rows: int) -> Iterator[_Side]:
    """The modalities that have rows."""
    text = min(max(int(counts[0]), 0), rows)
    for number, own in enumerate((slice(0, text), slice(text, rows))):
        if own.start < own.stop:
            read, write = (i if i is None else i[own] for i in (gather, scatter))
            size = torch.tensor([own.stop - own.start], dtype=torch.int32)
            yield _Side(number, own, size, read, write)


def _one(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.unsqueeze(0)


def forward(
    x: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None,
    b_vision: Tensor | None,
    residual: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    turned: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator modality_linear: out, h."""
    rows, n = x.shape[0], w_text.shape[0]
    width = n // 2 if activation == "swiglu" else n
    out = torch.empty((rows, width), dtype=x.dtype if residual is None else residual.dtype)
    h = x.new_empty((rows if keep else 0, n))
    x = x if x.stride(-1) == 1 else x.contiguous()
    for side in _sides(counts, gather, scatter, rows):
        weight, bias = ((w_text, b_text), (w_vision, b_vision))[side.number]
        if not keep and side.own.stop - side.own.start <= composed.few_of(x):
            _few(x, side, weight, bias, residual, activation, out)
            continue
        mine = slice(None) if side.write is not None else side.own
        composed.forward(
            x if side.read is not None else x[side.own], weight.unsqueeze(0), side.counts, side.read, side.write,
            _one(bias), None, None if residual is None else residual[mine], None, None, None, activation, len(out[mine]),
            keep, into=(out[mine], h[side.own]),
        )  # fmt: skip
    if cos is not None and sin is not None:
        _turn(out, out, cos, sin, turned)
    return out, h


def _few(
    x: Tensor,
    side: _Side,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
) -> None:
    """Decoding: the kernel at once, without a plan, which takes as long as a small weight."""
    count = side.own.stop - side.own.start
    p = x.new_empty((count, weight.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))
    rows = x if side.read is not None else x[side.own]
    kernel = getattr(torch.ops.mmkernels, composed.KERNEL).default
    kernel(rows, weight.unsqueeze(0), side.counts, side.read, 0, count, p)
    v = activate(p if bias is None else p.add_(bias), activation)
    at = side.own if side.write is None else side.write.long()
    if residual is not None:
        v = v + residual[at]
    composed.put(out, at, v)


def _turn(v: Tensor, out: Tensor, cos: Tensor, sin: Tensor, turned: int) -> None:
    """The first `turned` heads of v, turned, into out, a few rows at a time; v may be out."""
    half, wide = cos.shape[1], torch.promote_types(v.dtype, torch.float32)
    for start in range(0, len(v), TURNED):
        rows = slice(start, start + TURNED)
        given, found = (t[rows, : 2 * half * turned].view(-1, turned, 2, half) for t in (v, out))
        a, b = given.to(wide).unbind(2)
        c, s = (t[rows].to(wide).unsqueeze(1) for t in (cos, sin))
        first, second = torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s)
        found[:, :, 0], found[:, :, 1] = first, second


def backward(
    dout: Tensor,
    x: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None,
    b_vision: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    h: Tensor,
    turned: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The operator modality_linear_backward: dx, dw_text, dw_vision, db_text, db_vision."""
    if cos is not None and sin is not None:
        straight = dout.clone(memory_format=torch.contiguous_format)
        _turn(straight, straight, cos, -sin, turned)
        dout = straight
    rows, inputs = x.shape[0], (x, w_text, w_vision, b_text, b_vision)
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else x.new_empty(0)
    grads: list[Tensor | None] = [None, None, None, None]
    for side in _sides(counts, gather, scatter, rows):
        weight, bias = ((w_text, b_text), (w_vision, b_vision))[side.number]
        wanted = [needs[0], needs[1 + side.number], needs[3 + side.number], False, False, False, False]
        if not any(wanted):
            continue
        reads, writes = side.read is not None, side.write is not None
        found = composed_backward.backward(
            dout if writes else dout[side.own], x if reads else x[side.own], weight.unsqueeze(0), side.counts, side.read,
            side.write, _one(bias), None, None, None, None, None, h[side.own], activation,
            rows if writes else side.own.stop - side.own.start, wanted, into=dx if reads or not needs[0] else dx[side.own],
        )  # fmt: skip
        grads[side.number], grads[2 + side.number] = found[1], found[2]
    return dx, *(_filled(x, *pair) for pair in zip(grads, inputs[1:], needs[1:], strict=True))


def _filled(x: Tensor, grad: Tensor | None, parameter: Tensor | None, need: bool) -> Tensor:
    """The parameter's gradient, 0 where it has no rows, [0] where nobody needs it."""
    if not need or parameter is None:
        return x.new_empty(0)
    if grad is None:
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    return grad.squeeze(0)


def _present() -> str:
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{composed.KERNEL}", "CPU")
    return "" if found else f"{composed.KERNEL} is not compiled in this installation"


op.FORWARD.register("cpu", "cpp", forward, present=_present)
op.BACKWARD.register("cpu", "cpp", backward, present=_present)
