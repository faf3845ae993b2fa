"""Grouped linear on the GPU: tile tables and launchers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmkernels.primitives import _triton
from mmkernels.primitives.grouped_linear.op import out_width
from mmkernels.primitives.grouped_linear.triton import backward as _backward
from mmkernels.primitives.grouped_linear.triton import product as _product

Tile = tuple[int, int, int, int, int]  # rows M, outputs N, channels K, warps, pipeline stages

# Bits of the dtype -> tiles, most rows first; the last one is for decoding. Not yet measured on a device: chosen so that on
# sm_80, sm_90 and sm_100 nothing spills and shared memory fits (docs/compile-table.md).
PRODUCT: dict[int, tuple[Tile, ...]] = {
    16: ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (16, 64, 128, 4, 3)),
    32: ((64, 64, 32, 8, 2), (16, 64, 32, 4, 2)),
}
SWIGLU: dict[int, tuple[Tile, ...]] = {  # two sums
    16: ((128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (16, 64, 64, 4, 3)),
    32: ((64, 32, 32, 8, 2), (16, 32, 32, 4, 2)),
}
WEIGHT: dict[int, Tile] = {16: (64, 128, 128, 8, 2), 32: (32, 64, 64, 8, 2)}  # rows walked, outputs, channels
THIN: dict[int, Tile] = {16: (64, 16, 128, 4, 2), 32: (32, 16, 64, 4, 2)}  # dW of few outputs: a LoRA's
EPILOGUE = (16, 128, 4)  # rows, outputs, warps
SWIZZLE = 8  # tiles of rows that are neighbours before the next outputs


class Lora(NamedTuple):
    """t [M, R], the second factor b [S, N, R] by its strides, and where segments end."""

    t: Tensor
    b: Tensor
    strides: tuple[int, int, int]  # of segment, output, rank


class Finish(NamedTuple):
    """What a product's epilogue needs beside the sums."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None
    h: Tensor | None = None
    activation: str = ""
    half: int = 0


def _pad(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def precision(x: Tensor) -> str:
    """float32 as six bfloat16 products; the interpreter's float32 is float32."""
    return "tf32" if x.dtype != torch.float32 else "bf16x6" if x.is_cuda else "ieee"


def _tile(table: tuple[Tile, ...], rows: int, groups: int, n: int, units: int) -> Tile:
    """The most rows of which groups of mean size fill half, and that give every multiprocessor a program."""
    *large, least = table
    mean = rows / max(groups, 1)
    fits = [t for t in large if mean * 2 >= t[0]]
    enough = (t for t in fits if triton.cdiv(rows, t[0]) * triton.cdiv(n, t[1]) >= units)
    return next(enough, fits[-1] if fits else least)


def multiply(
    x: Tensor,
    w: tuple[Tensor, tuple[int, int, int], int],
    counts: Tensor,
    places: tuple[Tensor | None, Tensor | None, int],
    out: Tensor,
    finish: Finish,
    lora: Lora | None = None,
    ends: Tensor | None = None,
) -> None:
    """out from x [R, C] and w = (tensor, its strides by group, output, channel, outputs); places = (read, write, rows)."""
    (weight, strides, n), (read, write, rows), c = w, places, x.shape[1]
    table = (SWIGLU if finish.activation == "swiglu" else PRODUCT)[torch.finfo(x.dtype).bits]
    m, nb, k, warps, stages = _tile(table, rows, len(counts), n, _triton.facts(x)[1])
    tiles = triton.cdiv(rows // m + min(rows, len(counts)), SWIZZLE) * SWIZZLE
    t, b, b_strides = (None, None, (0, 0, 0)) if lora is None else lora
    s, r = (0, 0) if t is None or ends is None else (len(ends), t.shape[1])
    res_r = 0 if finish.residual is None else finish.residual.stride(0)
    _product.product[(tiles * triton.cdiv(n, nb),)](
        x, weight, counts, read, write, finish.bias, finish.scale, finish.residual, t, b, ends, out, finish.h,
        x.stride(0), *strides, *b_strides, res_r,
        len(counts), len(x), rows, len(out), n, c, s, r, finish.half,
        EP=_pad(len(counts)), SP=_pad(s), RP=_pad(r), M=m, NB=nb, K=k,
        ACTIVATION=finish.activation, PRECISION=precision(x), GROUPED=SWIZZLE, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def through(x: Tensor, weight: Tensor, counts: Tensor, read: Tensor | None, rows: int, back: bool) -> Tensor:
    """x[read] weight^T (or `back`: x weight) by group, [rows, N], rows of no group unwritten."""
    e, n, c = weight.stride()
    width = weight.shape[2] if back else weight.shape[1]
    out = x.new_empty((rows, width))
    strides = (e, c, n) if back else (e, n, c)
    multiply(x, (weight, strides, width), counts, (read, None, rows), out, Finish())
    return out


def _ends(counts: Tensor | None, rows: int) -> Tensor | None:
    return None if counts is None else counts.clamp(0, rows).cumsum(0, dtype=torch.int32)


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


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
    """The operator grouped_linear: one launch, two with LoRA."""
    x, residual = _triton.unit_rows(x), residual if residual is None else _triton.unit_rows(residual)
    counts, gather, scatter, bias, row_scale = _contiguous(counts, gather, scatter, bias, row_scale)
    m, width = x.shape[0] if gather is None else gather.shape[0], weight.shape[1]
    n = out_width(weight, activation)
    out = x.new_zeros((rows, n), dtype=x.dtype if residual is None else residual.dtype)
    h = x.new_zeros((m if keep else 0, width))
    if m == 0 or rows == 0 or n == 0:
        return out, h
    finish = Finish(bias, row_scale, residual, h if keep else None, activation, width - n)
    with torch.cuda.device_of(x):
        lora = None
        if lora_a is not None and lora_b is not None and lora_counts is not None:
            t = through(x, lora_a, lora_counts.contiguous(), gather, m, back=False)
            lora = Lora(t, lora_b, lora_b.stride())  # type: ignore[arg-type]
        multiply(
            x, (weight, weight.stride(), n), counts, (gather, scatter, m), out, finish, lora, _ends(lora_counts, m)  # type: ignore[arg-type]
        )  # fmt: skip
    return out, h


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
    """The operator grouped_linear_backward."""
    inputs = (x, weight, bias, row_scale, residual, lora_a, lora_b)
    grads = [
        t.new_zeros(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    ]
    m = x.shape[0] if gather is None else gather.shape[0]
    if m == 0 or rows == 0 or x.numel() == 0 or weight.shape[1] == 0:
        return tuple(grads)
    if (activation or row_scale is not None) and not len(h):
        first = (x, weight, counts, gather, scatter, bias, row_scale, residual, lora_a, lora_b, lora_counts)
        h = forward(*first, activation, rows, True)[1]
    x, counts = _triton.unit_rows(x), counts.contiguous()
    with torch.cuda.device_of(x):
        places = _contiguous(row_scale, counts, gather, scatter)
        dh, source = epilogue_backward(dout, x, h, places, activation, grads)
        lora = (lora_a, lora_b, lora_counts) if lora_a is not None else None
        _input_grads(dh, x, weight, counts, source, lora, grads, gather is not None)
        if needs[1] or needs[2]:
            dweight = grads[1] if needs[1] else weight.new_empty(weight.shape)
            weight_grad(dh, x, counts, source, (dweight, grads[2] if needs[2] else None), gathered=True)
    return tuple(grads)


def epilogue_backward(
    dout: Tensor, x: Tensor, h: Tensor, places: tuple[Any, ...], activation: str, grads: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """dh [M, N] in x's dtype and the row of x that each row reads; fills the gradients of row_scale and residual."""
    scale, counts, gather, scatter = places
    m, dout = x.shape[0] if gather is None else gather.shape[0], _triton.unit_rows(dout)
    n, width = dout.shape[1], h.shape[1]
    dh, source = x.new_empty((m, width)), counts.new_empty(m)
    dscale, dresidual = (g if g.numel() else None for g in (grads[3], grads[4]))
    rows, nb, warps = EPILOGUE
    _backward.epilogue_backward[(triton.cdiv(m, rows),)](
        dout, h if len(h) else None, scale, counts, gather, scatter, dh, dscale, dresidual, source,
        dout.stride(0), len(counts), len(x), m, len(dout), n, width - n,
        EP=_pad(len(counts)), M=rows, NB=nb, ACTIVATION=activation, num_warps=warps,
    )  # fmt: skip
    return dh, source


def _input_grads(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    source: Tensor,
    lora: tuple[Any, ...] | None,
    grads: list[Tensor],
    gathered: bool,
) -> None:
    """dx, and the gradients of LoRA's factors, whose products it shares."""
    m, extra, ends = len(source), None, None
    if lora is not None:
        a, b, segments = lora[0], lora[1], lora[2].contiguous()
        dt = through(dh, b, segments, None, m, back=True)
        extra, ends = Lora(dt, a, (a.stride(0), a.stride(2), a.stride(1))), _ends(segments, m)
        if grads[5].numel():
            weight_grad(dt, x, segments, source, (grads[5], None), gathered=True)
        if grads[6].numel():
            t = through(x, a, segments, source, m, back=False)
            weight_grad(dh, t, segments, source, (grads[6], None), gathered=False)
    if not grads[0].numel():
        return
    e, n, c = weight.stride()
    da = x.new_empty((m, x.shape[1]), dtype=torch.float32) if gathered else grads[0]
    back = (weight, (e, c, n), x.shape[1])
    multiply(dh, back, counts, (None, None, m), da, Finish(), extra, ends)
    if gathered:
        _add_rows(da, source, grads[0])


def _add_rows(da: Tensor, source: Tensor, dx: Tensor) -> None:
    found = torch.sort(source, stable=True)
    edges = torch.arange(len(dx) + 1, device=dx.device, dtype=torch.int32)
    starts, c = torch.searchsorted(found.values, edges), dx.shape[1]
    nb = min(1024, _pad(c))
    _backward.add_rows[(len(dx) * triton.cdiv(c, nb),)](da, found.indices, starts, dx, c, NB=nb, num_warps=4)


def weight_grad(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    source: Tensor,
    into: tuple[Tensor, Tensor | None],
    *,
    gathered: bool,
) -> None:
    """Fills dw [E, N, C] and db [E, N]; a walk that few programs would take alone is shared and added up in order."""
    (dw, db), rows = into, len(source)
    e, n, c = dw.shape
    if n == 0 or c == 0:
        return
    m, nb, kb, warps, stages = (THIN if n <= 16 else WEIGHT)[torch.finfo(x.dtype).bits]
    programs = e * triton.cdiv(n, nb) * triton.cdiv(c, kb)
    splits = max(1, min(_triton.facts(x)[1] // programs, triton.cdiv(rows, e) // (4 * m), 16))
    part, bias_part = (
        t if splits == 1 or t is None else t.new_empty((splits, *t.shape), dtype=torch.float32)
        for t in (dw, db)
    )
    _backward.weight_backward[(programs * splits,)](
        dy, x, counts, source, part, bias_part, dy.stride(0), x.stride(0), e, rows, n, c,
        EP=_pad(e), M=m, NB=nb, KB=kb, SPLITS=splits, GATHERED=gathered, PRECISION=precision(x),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        dw.copy_(part.sum(0))  # type: ignore[union-attr]
        if db is not None:
            db.copy_(bias_part.sum(0))  # type: ignore[union-attr]
