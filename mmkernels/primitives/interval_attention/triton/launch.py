"""Interval attention on the GPU: tile tables, launchers, and what the ahead-of-time compiler needs to know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.primitives import _triton
from mmkernels.primitives.interval_attention.triton import backward as _backward
from mmkernels.primitives.interval_attention.triton import forward as _forward

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


def splits_for(programs: int, walk: int, units: int) -> int:
    """Into how many splits of at least 4 tiles a walk over `walk` tiles goes when there are too few programs. Shapes alone
    decide: nothing waits for the device."""
    return max(1, min(units // max(programs, 1), walk // 4, 32))


def constants(width: int, dtype: torch.dtype, interpreted: bool = False) -> dict[str, Any]:
    """What a kernel is compiled for. float32 operands are cut into three bfloat16 pieces and multiplied by six products on the
    tensor cores, which is no less exact than a chain of float32 multiply-adds; their scores are in base e (forward.py)."""
    wide = "ieee" if interpreted else "bf16x6"  # the interpreter's float32 products are float32's
    natural = dtype == torch.float32
    return {
        "D": width,
        "PARTS": _triton.parts(width),
        "PRECISION": wide if natural else "tf32",
        "NATURAL": natural,
    }


class Call:
    """One call's inputs as the kernels take them: unit rows, contiguous intervals, sizes and numbers."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> None:
        *rows, seed, scale, p = rules
        self.q, self.k, self.v = (_triton.unit_rows(x) for x in (q, k, v))
        self.strides = tuple(s for x in (self.q, self.k, self.v) for s in x.stride()[:3])
        self.rows = (*(x if x is None else x.contiguous() for x in rows), seed if p > 0 else None)
        self.b, self.tq, self.h, self.d = q.shape
        self.tk, g = k.shape[1:3]
        self.r, self.stacks = (
            self.h // g,
            self.b * g,
        )  # query heads to a key head; key heads of all batch rows
        self.units, self.constants = _triton.facts(q)[1], constants(self.d, q.dtype, not q.is_cuda)
        self.scale, self.unit_scale = scale, scale * _forward.unit(self.constants["NATURAL"])
        self.dropout = (1.0 / (1.0 - p), int(p * 4294967296.0))

    def tile(self, table: dict[tuple[int, int], tuple[Tile, ...]]) -> Tile:
        """The largest tile that still gives every multiprocessor a program; the decoding tile when the rows fit in it."""
        *large, smallest = tiles_for(table, self.d, self.q.dtype)
        rows = self.tq * self.r
        if rows <= smallest[0]:
            return smallest
        return next((t for t in large if triton.cdiv(rows, t[0]) * self.stacks >= self.units), large[-1])


def _workspace(like: Tensor, splits: int) -> Tensor:
    return like if splits == 1 else like.new_empty((splits, *like.shape), dtype=torch.float32)


def _add_splits(part: Tensor, grad: Tensor, splits: int) -> None:
    if splits > 1:
        _backward.add_splits[(triton.cdiv(grad.numel(), 1024),)](
            part, grad, grad.numel(), SPLITS=splits, BLOCK=1024
        )


def forward(q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    """out [B,Tq,H,D], lse [B,H,Tq]: one launch, two when few rows attend to many keys."""
    b, tq, h, d = q.shape
    out, lse = q.new_empty((b, tq, h, d)), q.new_empty((b, h, tq), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    c = Call(q, k, v, *rules)
    m, n, warps, stages = c.tile(FORWARD)
    programs = triton.cdiv(tq * c.r, m) * c.stacks
    splits = splits_for(programs, triton.cdiv(c.tk, n), c.units)
    part, part_lse = _workspace(out, splits), _workspace(lse, splits)
    with torch.cuda.device_of(q):
        _forward.forward[(programs * splits,)](
            c.q, c.k, c.v, *c.rows, part, part_lse, *c.strides,
            tq, c.tk, h, c.r, b * tq * h, c.unit_scale, *c.dropout,
            M=m, N=n, SPLITS=splits, num_warps=warps, num_stages=stages, **c.constants,
        )  # fmt: skip
        if splits > 1:
            rows, parts = b * tq * h, c.constants["PARTS"]
            _forward.combine[(triton.cdiv(rows, 16),)](
                part, part_lse, out, lse, tq, h, rows, D=d, PARTS=parts, M=16, SPLITS=splits
            )
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: three launches (dQ, hulls, dK and dV), and one to add up each gradient that was split."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    c, dout = Call(q, k, v, *rules), _triton.unit_rows(dout)
    with torch.cuda.device_of(q):
        dlse = None if dlse is None else dlse.contiguous()
        facts = _backward_q(c, (dout, dlse, out.contiguous(), lse.contiguous()), dq)
        _backward_kv(c, dout, facts, dk, dv)
    return dq, dk, dv


def _backward_q(c: Call, given: tuple[Any, ...], dq: Tensor) -> tuple[Any, ...]:
    """Fills dq and returns what `_backward_kv` needs of every row: norm, delta, gain (float32, where one program sees the
    whole row)."""
    dout, dlse, out, lse = given
    m, n, warps, stages = c.tile(BACKWARD_Q)
    padded = triton.cdiv(c.tq * c.r, m) * m
    programs = c.stacks * padded // m
    splits = splits_for(programs, triton.cdiv(c.tk, n), c.units)
    norm, delta, gain = lse.new_empty((3, c.stacks, padded))
    gain = gain if c.constants["NATURAL"] and splits == 1 else None
    part = _workspace(dq, splits)
    _backward.backward_q[(programs * splits,)](
        dout, dlse, c.q, c.k, c.v, out, lse, *c.rows, part, norm, delta, gain, *dout.stride()[:3], *c.strides,
        c.tq, c.tk, c.h, c.r, c.b * c.tq * c.h, c.scale, c.unit_scale, *c.dropout,
        M=m, N=n, SPLITS=splits, num_warps=warps, num_stages=stages, **c.constants,
    )  # fmt: skip
    _add_splits(part, dq, splits)
    return norm, delta, gain


def _backward_kv(c: Call, dout: Tensor, facts: tuple[Any, ...], dk: Tensor, dv: Tensor) -> None:
    m, n, warps, stages = c.tile(BACKWARD_KV)
    tiles = triton.cdiv(c.tq * c.r, m)
    groups = triton.cdiv(tiles, 64)
    new = c.rows[0].new_empty
    hulls, sets, group_hulls = (
        new((4, c.b, tiles)),
        new((2, c.b, tiles), dtype=torch.int64),
        new((2, c.b, groups)),
    )
    _backward.hulls[(c.b * groups,)](
        *c.rows[:3], hulls, sets, group_hulls, c.b, c.tq, c.tk, c.r, tiles, groups, M=m
    )
    programs = triton.cdiv(c.tk, n) * c.stacks
    splits = splits_for(programs, tiles, c.units)
    part_k, part_v = _workspace(dk, splits), _workspace(dv, splits)
    _backward.backward_kv[(programs * splits,)](
        dout, c.q, c.k, c.v, *facts, *c.rows, hulls, sets, group_hulls, part_k, part_v,
        *dout.stride()[:3], *c.strides, c.b, c.tq, c.tk, c.h, c.r, tiles, groups, facts[0].shape[1], c.tk * c.stacks,
        c.scale, c.unit_scale, *c.dropout,
        M=m, N=n, SPLITS=splits, num_warps=warps, num_stages=stages, **c.constants,
    )  # fmt: skip
    _add_splits(part_k, dk, splits)
    _add_splits(part_v, dv, splits)
