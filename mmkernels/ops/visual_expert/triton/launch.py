"""The expert's linear map on the GPU: launchers over the grouped linear map's kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.ops.visual_expert.triton import kernels
from mmkernels.primitives import _triton
from mmkernels.primitives.grouped_linear.triton import launch as grouped

HEADS = 16  # that a program turns at once


def _apart(w_text: Tensor, w_vision: Tensor) -> int:
    """How many elements lie between the two weights."""
    return (w_vision.data_ptr() - w_text.data_ptr()) // w_text.element_size()


def _biases(b_text: Tensor | None, b_vision: Tensor | None) -> Tensor | None:
    """[2, N], zeros for an absent one: as small as a row."""
    given = b_vision if b_text is None else b_text
    if given is None:
        return None
    return torch.stack([torch.zeros_like(given) if b is None else b for b in (b_text, b_vision)])


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _turn(v: Tensor, out: Tensor, table: tuple[Tensor, Tensor], turned: int, back: bool) -> None:
    cos, sin = (t.contiguous() for t in table)
    half, heads = cos.shape[1], turned if v is out else v.shape[1] // (2 * cos.shape[1])
    width = triton.next_power_of_2(half)
    kernels.turn[(len(v),)](
        v, out, cos, sin, v.stride(0), out.stride(0), turned, half, heads,
        HB=min(HEADS, triton.next_power_of_2(heads)), WB=width, BACK=back, num_warps=4,
    )  # fmt: skip


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
    """The operator modality_linear: one launch, two with a table."""
    x, residual = _triton.unit_rows(x), residual if residual is None else _triton.unit_rows(residual)
    gather, scatter = _contiguous(gather, scatter)
    w_text, w_vision, rows, (width, c) = w_text.contiguous(), w_vision.contiguous(), len(x), w_text.shape
    n = width // 2 if activation == "swiglu" else width
    out = x.new_empty((rows, n), dtype=x.dtype if residual is None else residual.dtype)
    h = x.new_empty((rows if keep else 0, width))
    if rows == 0 or n == 0:
        return out, h
    bias = _biases(b_text, b_vision)
    finish = grouped.Finish(bias, None, residual, h if keep else None, activation, width - n)
    with torch.cuda.device_of(x):
        weight = (w_text, (_apart(w_text, w_vision), c, 1), n)
        grouped.multiply(x, weight, counts.contiguous(), (gather, scatter, rows), out, finish)
        if cos is not None and sin is not None:
            _turn(out, out, (cos, sin), turned, back=False)
    return out, h


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
    """The operator modality_linear_backward."""
    inputs = (x, w_text, w_vision, b_text, b_vision)
    grads = [
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    ]
    if x.numel() == 0 or len(w_text) == 0:
        return tuple(grads)
    first = (x, counts, gather, scatter, w_text, w_vision, b_text, b_vision)
    if activation and not len(h):
        h = forward(*first, None, None, None, 0, activation, True)[1]
    h = h if len(h) else x.new_empty((0, len(w_text)))
    x, dout, counts = _triton.unit_rows(x), _triton.unit_rows(dout), counts.contiguous()
    gather, scatter = _contiguous(gather, scatter)
    w_text, w_vision = w_text.contiguous(), w_vision.contiguous()
    with torch.cuda.device_of(x):
        if cos is not None and sin is not None:
            straight = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
            _turn(dout, straight, (cos, sin), turned, back=True)
            dout = straight
        none = [x.new_empty(0)] * 7
        dh, source = grouped.epilogue_backward(dout, x, h, (None, counts, gather, scatter), activation, none)
        if needs[0]:
            weight = (w_text, (_apart(w_text, w_vision), 1, x.shape[1]), x.shape[1])
            grouped.multiply(dh, weight, counts, (None, gather, len(x)), grads[0], grouped.Finish())
        _weight_grads(dh, x, counts, source, grads)
    return tuple(grads)


def _weight_grads(dh: Tensor, x: Tensor, counts: Tensor, source: Tensor, grads: list[Tensor]) -> None:
    """Each modality by itself: vision's walk is over all rows, those of text left out."""
    is_text = torch.arange(len(source), device=x.device) < counts[0]
    every = torch.full_like(counts[:1], len(source))
    sides = ((counts[:1], source), (every, torch.where(is_text, -1, source)))
    for side, (size, read) in enumerate(sides):
        dw, db = grads[1 + side], grads[3 + side]
        if not dw.numel() and not db.numel():
            continue
        into = dw if dw.numel() else x.new_empty((dh.shape[1], x.shape[1]))
        grouped.weight_grad(
            dh, x, size, read, (into.unsqueeze(0), db.unsqueeze(0) if db.numel() else None), gathered=True
        )
