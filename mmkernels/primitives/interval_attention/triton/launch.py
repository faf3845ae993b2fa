"""Interval attention on the GPU: tile tables, launchers, and what the ahead-of-time compiler needs to know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.primitives import _triton
from mmkernels.primitives.interval_attention.triton import backward as _backward
from mmkernels.primitives.interval_attention.triton import forward as _forward

LOG2E = 1.4426950408889634
Tile = tuple[int, int, int, int]  # query rows M, keys N, warps, pipeline stages

# Widest head, bits of the dtype -> tiles, most query rows first; the last one is for decoding. Not yet measured on a device:
# chosen so that on sm_80, sm_90 and sm_100 nothing spills and shared memory fits (docs/compile-table.md).
FORWARD: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 16): ((128, 64, 4, 2), (64, 64, 4, 2), (16, 64, 4, 2)),
    (128, 16): ((64, 64, 4, 2), (16, 64, 4, 2)),
    (256, 16): ((64, 32, 8, 2), (16, 32, 4, 2)),
    (64, 32): ((64, 32, 4, 2), (16, 32, 4, 2)),
    (128, 32): ((64, 32, 8, 2), (16, 32, 4, 2)),
    (256, 32): ((32, 32, 8, 1), (16, 32, 8, 1)),
}
BACKWARD_Q: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 16): ((64, 64, 4, 2), (16, 64, 4, 2)),
    (128, 16): ((64, 32, 4, 2), (16, 32, 4, 2)),
    (256, 16): ((64, 32, 8, 2), (16, 32, 4, 2)),
    (64, 32): ((64, 32, 8, 2), (16, 32, 4, 2)),
    (128, 32): ((32, 32, 8, 2), (16, 32, 4, 2)),
    (256, 32): ((32, 32, 8, 1), (16, 32, 8, 1)),
}
BACKWARD_KV: dict[tuple[int, int], tuple[Tile, ...]] = {
    (64, 16): ((32, 64, 4, 1), (16, 64, 4, 1)),
    (128, 16): ((32, 64, 8, 1), (16, 64, 8, 1)),
    (256, 16): ((32, 32, 8, 1), (16, 32, 8, 1)),
    (64, 32): ((32, 32, 4, 1), (16, 32, 4, 1)),
    (128, 32): ((32, 32, 8, 1), (16, 32, 8, 1)),
    (256, 32): ((16, 16, 8, 1), (16, 16, 8, 1)),
}


def tiles_for(
    table: dict[tuple[int, int], tuple[Tile, ...]], width: int, dtype: torch.dtype
) -> tuple[Tile, ...]:
    padded = sum(_triton.parts(width))
    return table[max(64, 1 << (padded - 1).bit_length()), torch.finfo(dtype).bits]


def pick(tiles: tuple[Tile, ...], rows: int, others: int, units: int) -> Tile:
    """The largest tile that still gives every multiprocessor a program, else the smallest that is more than half full."""
    for tile in tiles[:-1]:
        if triton.cdiv(rows, tile[0]) * others >= units:
            return tile
    return tiles[-1] if rows <= tiles[-1][0] else tiles[-2]


def splits_for(programs: int, walk: int, units: int) -> int:
    """Into how many splits of at least 4 tiles a walk over `walk` tiles goes when there are too few programs. Shapes alone
    decide: nothing waits for the device."""
    return max(1, min(units // max(programs, 1), walk // 4, 32))


def _inputs(
    lo: Tensor, hi: Tensor, uniform: Tensor | None, slopes: Tensor | None, seed: Tensor | None, p: float
) -> tuple:
    """The per-row inputs, contiguous; a seed only if anything drops out."""
    rows = (x if x is None else x.contiguous() for x in (lo, hi, uniform, slopes))
    return (*rows, seed if p > 0 else None)


def _constants(q: Tensor) -> dict[str, Any]:
    """What a kernel is compiled for. float32 operands are cut into three bfloat16 pieces and multiplied by six products on the
    tensor cores, which is no less exact than a chain of float32 multiply-adds; their scores are in base e (forward.py)."""
    wide = q.dtype == torch.float32
    precision, unit = ("tf32x3", LOG2E) if wide else ("tf32", 1.0)
    return {"D": q.shape[3], "PARTS": _triton.parts(q.shape[3]), "PRECISION": precision, "UNIT": unit}


def _dropout(p: float) -> tuple[float, int]:
    return 1.0 / (1.0 - p), int(p * 4294967296.0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    uniform: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out [B,Tq,H,D], lse [B,H,Tq]: one launch, two when few rows attend to many keys."""
    b, tq, h, d = q.shape
    tk, g = k.shape[1:3]
    out, lse = q.new_empty((b, tq, h, d)), q.new_empty((b, h, tq), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = (_triton.unit_rows(x) for x in (q, k, v))
    units, common = _triton.facts(q)[1], _constants(q)
    m, n, warps, stages = pick(tiles_for(FORWARD, d, q.dtype), tq * h // g, b * g, units)
    programs = triton.cdiv(tq * h // g, m) * b * g
    splits = splits_for(programs, triton.cdiv(tk, n), units)
    o, l = out, lse
    if splits > 1:
        o, l = q.new_empty((splits, b, tq, h, d), dtype=torch.float32), lse.new_empty((splits, b, h, tq))
    with torch.cuda.device_of(q):
        _forward.forward[(programs * splits,)](
            q, k, v, *_inputs(lo, hi, uniform, alibi_slopes, seed, dropout_p), o, l,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            tq, tk, h, h // g, b * tq * h, scale * LOG2E / common["UNIT"], *_dropout(dropout_p),
            M=m, N=n, SPLITS=splits, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
        if splits > 1:
            grid = (triton.cdiv(b * tq * h, 16),)
            _forward.combine[grid](
                o, l, out, lse, tq, h, b * tq * h, D=d, PARTS=common["PARTS"], M=16, SPLITS=splits
            )
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: three launches (hulls, dQ, dK and dV), and one to add up each gradient that was split."""
    lo, hi, uniform, alibi_slopes, seed, scale, dropout_p = rules
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    b, tq, h, d = q.shape
    tk, g = k.shape[1:3]
    dout, q, k, v = (_triton.unit_rows(x) for x in (dout, q, k, v))
    rows = _inputs(lo, hi, uniform, alibi_slopes, seed, dropout_p)
    strides = (s for x in (dout, q, k, v) for s in x.stride()[:3])
    strides, units = tuple(strides), _triton.facts(q)[1]
    common = _constants(q)
    numbers = (scale, scale * LOG2E / common["UNIT"], *_dropout(dropout_p))
    m, n, warps, stages = pick(tiles_for(BACKWARD_Q, d, q.dtype), tq * h // g, b * g, units)
    programs = triton.cdiv(tq * h // g, m) * b * g
    padded = programs // (b * g) * m
    norm, delta = lse.new_empty((2, b * g, padded))
    with torch.cuda.device_of(q):
        splits = splits_for(programs, triton.cdiv(tk, n), units)
        part = _workspace(dq, splits)
        _backward.backward_q[(programs * splits,)](
            dout, None if dlse is None else dlse.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), *rows,
            part, norm, delta, *strides, tq, tk, h, h // g, b * tq * h, *numbers,
            M=m, N=n, SPLITS=splits, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
        _add_splits(part, dq, splits)
        smallest = tiles_for(BACKWARD_KV, d, q.dtype)
        m, n, warps, stages = smallest[-1] if m == smallest[-1][0] else smallest[0]
        tiles = triton.cdiv(tq * h // g, m)
        groups = triton.cdiv(tiles, 64)
        hulls, sets = lo.new_empty((4, b, tiles)), lo.new_empty((2, b, tiles), dtype=torch.int64)
        group_hulls = lo.new_empty((2, b, groups))
        _backward.hulls[(b * groups,)](
            *rows[:3], hulls, sets, group_hulls, b, tq, tk, h // g, tiles, groups, M=m
        )
        programs = triton.cdiv(tk, n) * b * g
        splits = splits_for(programs, tiles, units)
        part_k, part_v = _workspace(dk, splits), _workspace(dv, splits)
        _backward.backward_kv[(programs * splits,)](
            dout, q, k, v, norm, delta, *rows, hulls, sets, group_hulls, part_k, part_v, *strides,
            b, tq, tk, h, h // g, tiles, groups, padded, b * tk * g, *numbers,
            M=m, N=n, SPLITS=splits, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
        _add_splits(part_k, dk, splits)
        _add_splits(part_v, dv, splits)
    return dq, dk, dv


def _workspace(grad: Tensor, splits: int) -> Tensor:
    return grad if splits == 1 else grad.new_empty((splits, *grad.shape), dtype=torch.float32)


def _add_splits(part: Tensor, grad: Tensor, splits: int) -> None:
    if splits > 1:
        _backward.add_splits[(triton.cdiv(grad.numel(), 1024),)](
            part, grad, grad.numel(), SPLITS=splits, BLOCK=1024
        )
