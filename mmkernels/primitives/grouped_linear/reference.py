"""Grouped linear, the law. Letters: R rows of x, M rows in group order, O rows of out, E groups, N and C weight, S segments.

    h[i]   = x[gather[i]] weight[e]^T + bias[e] + (x[gather[i]] a[s]^T) b[s]^T      e, s: the group and segment of i
    out[scatter[i]] = residual[scatter[i]] + row_scale[i] activation(h[i])          an output row that no i reaches: 0

Group e owns the `counts[e]` rows after those of group e - 1. Rows of no group, and rows that read or write no place, are left
out by selection: NaN times 0 is NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Rows(NamedTuple):
    """Per row in group order: its group (E: none), the row of x it reads (R: none), the row of out it writes (O: none)."""

    group: Tensor
    read: Tensor
    write: Tensor
    hit: Tensor  # [O, 1] the rows of out that are written


def _owner(counts: Tensor, m: int) -> Tensor:
    """The group of each of m rows, as many as there are groups for the rows past the last."""
    ends = counts.clamp(min=0).cumsum(0)
    return torch.searchsorted(ends, torch.arange(m, device=counts.device), right=True)


def _rows(x: Tensor, counts: Tensor, gather: Tensor | None, scatter: Tensor | None, rows: int) -> _Rows:
    r, m = x.shape[0], x.shape[0] if gather is None else gather.shape[0]
    each = torch.arange(m, device=x.device)
    group = _owner(counts, m)
    read = each if gather is None else gather.long()
    write = each if scatter is None else scatter.long()
    some = (group < counts.shape[0]) & (read >= 0) & (read < r) & (write >= 0) & (write < rows)
    write = torch.where(some, write, rows)
    hit = torch.zeros(rows + 1, 1, dtype=torch.bool, device=x.device).index_fill(0, write, True)[:rows]
    return _Rows(torch.where(some, group, counts.shape[0]), torch.where(some, read, r), write, hit)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x[index] where index = len(x) gives zeros."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[index]


def _product(a: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """y[i] = a[i] weight[group[i]]^T, 0 for a row of no group."""
    y = a.new_zeros(a.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        y = torch.where((group == e).unsqueeze(1), a @ weight[e].T, y)
    return y


def _product_backward(dy: Tensor, a: Tensor, weight: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """da and dweight of `_product`."""
    da, dweight = torch.zeros_like(a), torch.zeros_like(weight)
    for e in range(weight.shape[0]):
        own = (group == e).unsqueeze(1)
        da = torch.where(own, dy @ weight[e], da)
        dweight[e] = torch.where(own, dy, 0).T @ torch.where(own, a, 0)
    return da, dweight


def activate(h: Tensor, activation: str) -> Tensor:
    """The epilogue's function; "swiglu" takes [gate; up] and halves the width."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(h)
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if activation == "silu":
        return F.silu(h)
    return h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else h


def activate_backward(da: Tensor, h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        return torch.cat([da * up * s * (1 + gate * (1 - s)), da * gate * s], -1)
    if activation == "gelu":
        pdf = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
        return da * (0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * pdf)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    if activation in ("silu", "quick_gelu"):
        slope = 1.0 if activation == "silu" else 1.702
        s = torch.sigmoid(slope * h)
        return da * s * (1 + slope * h * (1 - s))
    return da


def _wide(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(
        t if t is None else t.to(torch.promote_types(t.dtype, torch.float32))  # type: ignore[misc]
        for t in tensors
    )


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: _Rows,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h [M, N], the rows [M, C] it was made from, and their LoRA products [M, K]; all of them wide."""
    a = _pick(x, rows.read)
    h, t = _product(a, weight, rows.group), None
    if bias is not None:
        h = h + _pick(bias, rows.group)
    if lora_a is not None:
        assert lora_b is not None and segment is not None
        t = _product(a, lora_a, segment)
        h = h + _product(t, lora_b, segment)
    return h, a, t


def _segment(lora_counts: Tensor | None, rows: _Rows, groups: int) -> Tensor | None:
    if lora_counts is None:
        return None
    segment = _owner(lora_counts, rows.group.shape[0])
    return torch.where(rows.group < groups, segment, lora_counts.shape[0])


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
) -> tuple[Tensor, Tensor]:
    """out [O, N] (N / 2 for swiglu), and h [M, N] if `keep`, else [0, N]."""
    at = _rows(x, counts, gather, scatter, rows)
    segment = _segment(lora_counts, at, counts.shape[0])
    wide = _wide(x, weight, bias, lora_a, lora_b)
    h, _, _ = _linear(*wide, at, segment)  # type: ignore[call-arg]
    v = activate(h, activation)
    if row_scale is not None:
        some = at.group < counts.shape[0]
        v = v * torch.where(some, row_scale, 0).to(v.dtype).unsqueeze(1)
    out = v.new_zeros(rows + 1, v.shape[1]).index_copy(0, at.write, v)[:rows]
    if residual is not None:
        out = out + residual.to(out.dtype)
    out = torch.where(at.hit, out, 0).to(x.dtype if residual is None else residual.dtype)
    return out.contiguous(), h.to(x.dtype) if keep else x.new_empty(0, h.shape[1])


def backward(
    dout: Tensor,
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
    h: Tensor,
    activation: str,
    rows: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """dx, dweight, dbias, drow_scale, dresidual, dlora_a, dlora_b; [0] for one that nobody `needs`.

    `h` is what faster kernels start from; the law computes it again.
    """
    at = _rows(x, counts, gather, scatter, rows)
    segment = _segment(lora_counts, at, counts.shape[0])
    x_, w, b, la, lb, do = _wide(x, weight, bias, lora_a, lora_b, dout)
    h, a, t = _linear(x_, w, b, la, lb, at, segment)
    do = _pick(do, at.write)
    dscale = (do * activate(h, activation)).sum(1)
    if row_scale is not None:
        do = do * torch.where(at.group < counts.shape[0], row_scale, 0).to(do.dtype).unsqueeze(1)
    dh = activate_backward(do, h, activation)
    da, dweight = _product_backward(dh, a, w, at.group)
    dbias = dh.new_zeros(len(w) + 1, w.shape[1]).index_add(0, at.group, dh)[:-1]
    dla = dlb = None
    if segment is not None and t is not None:
        dt, dlb = _product_backward(dh, t, lb, segment)
        more, dla = _product_backward(dt, a, la, segment)
        da = da + more
    dx = x_.new_zeros(len(x) + 1, x.shape[1]).index_add(0, at.read, da)[:-1]
    dresidual = torch.where(at.hit, dout, 0)
    grads = (dx, dweight, dbias, dscale, dresidual, dla, dlb)
    return _like(grads, (x, weight, bias, row_scale, residual, lora_a, lora_b), needs)


def _like(
    grads: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients in their inputs' dtypes, contiguous."""
    first = inputs[0]
    assert first is not None
    return tuple(
        g.to(x.dtype).contiguous() if need and g is not None and x is not None else first.new_empty(0)
        for g, x, need in zip(grads, inputs, needs, strict=True)
    )
