"""Attention inside packed slices on the GPU: the table of tiles, and launchers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image.triton import kernels
from mmkernels.primitives import _triton
from mmkernels.primitives.interval_attention.triton import launch as interval
from mmkernels.primitives.routing.reference import tiles_of


def tiles(offsets: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """The slice and first row of every tile of `size` rows, as many as any slices can need; slice -1: no such tile."""
    return tiles_of(offsets[1:] - offsets[:-1], offsets, rows, size)


class Call:
    """One call's inputs as the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> None:
        self.q, self.k, self.v = (_triton.unit_rows(x) for x in (q, k, v))
        self.strides = tuple(s for x in (self.q, self.k, self.v) for s in x.stride()[:2])
        (self.t, self.h, self.d), self.g = q.shape, k.shape[1]
        self.offsets, self.scale = offsets.contiguous(), scale
        made = interval.constants(self.d, q.dtype, interpreted=not q.is_cuda)
        self.constants = {name: made[name] for name in ("D", "PARTS", "PRECISION")}
        self.sizes = (self.t, self.h, self.h // max(self.g, 1), scale)

    def tile(self, table: dict[Any, Any]) -> tuple[int, int, dict[str, int]]:
        """Rows, keys, and how a program runs; slices are long, so the table's first entry fits."""
        m, n, warps, stages = interval.tiles_for(table, self.d, self.q.dtype)[0]
        return m, n, {"num_warps": warps, "num_stages": stages}


def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The operator slice_attention: one launch."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    c = Call(q, k, v, offsets, scale)
    m, n, how = c.tile(interval.FORWARD)
    with torch.cuda.device_of(q):
        owner, row = tiles(c.offsets, c.t, m)
        kernels.slice_forward[(len(owner) * c.h,)](
            c.q,
            c.k,
            c.v,
            c.offsets,
            owner,
            row,
            out,
            lse,
            *c.strides,
            *c.sizes,
            M=m,
            N=n,
            **how,
            **c.constants,
        )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator slice_attention_backward: two launches."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv
    c, dout = Call(q, k, v, offsets, scale), _triton.unit_rows(dout)
    out, lse = out.contiguous(), lse.contiguous()
    delta, strides = torch.empty_like(lse), (*dout.stride()[:2], *c.strides)
    with torch.cuda.device_of(q):
        m, n, how = c.tile(interval.BACKWARD_Q)
        owner, row = tiles(c.offsets, c.t, m)
        kernels.slice_backward_q[(len(owner) * c.h,)](
            dout, c.q, c.k, c.v, out, lse, c.offsets, owner, row, dq, delta, *strides, *c.sizes, M=m, N=n, **how,
            **c.constants,
        )  # fmt: skip
        m, n, how = c.tile(interval.BACKWARD_KV)
        owner, row = tiles(c.offsets, c.t, n)
        kernels.slice_backward_kv[(len(owner) * c.g,)](
            dout, c.q, c.k, c.v, lse, delta, c.offsets, owner, row, dk, dv, *strides, *c.sizes, M=m, N=n, **how,
            **c.constants,
        )  # fmt: skip
    return dq, dk, dv
