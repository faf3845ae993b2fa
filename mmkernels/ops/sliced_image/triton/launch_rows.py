"""Low-rank updates and splicing on the GPU: launchers."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.ops.sliced_image.triton import rows
from mmkernels.primitives import _triton
from mmkernels.primitives.interval_attention.triton.launch import constants
from mmkernels.primitives.routing import route_groups

M, WIDE = 64, 128  # rows of a tile, and channels at once
COLUMNS = 1024  # of a row that is copied


class Windows:
    """Rows in the order of their windows; those of none are window `count`."""

    def __init__(self, segment: Tensor, count: int, rank: int, dtype: torch.dtype) -> None:
        none = (segment < 0) | (segment >= count)
        groups = route_groups(torch.where(none, count, segment).to(torch.int32), count + 1, tile=M)
        self.count, self.rank, self.order, self.offsets = count, rank, groups.order, groups.offsets
        self.tables = (groups.order, groups.tile_group, groups.tile_row, groups.offsets)
        self.tiles = len(groups.tile_group)
        # what lies between the products is float32, whatever x is
        precision = constants(16, torch.float32, interpreted=not segment.is_cuda)["PRECISION"]
        self.size = {"KP": max(16, triton.next_power_of_2(rank)), "M": M, "PRECISION": precision}
        self.down = self.size | {"PRECISION": precision if dtype == torch.float32 else "tf32"}


def _down(w: Windows, x: Tensor, a: Tensor, strides: tuple[int, int, int]) -> Tensor:
    t = x.new_empty((len(x), w.rank), dtype=torch.float32)
    rows.down[(w.tiles,)](
        x,
        a,
        *w.tables,
        t,
        x.stride(0),
        *strides,
        w.count,
        w.rank,
        x.shape[1],
        CB=WIDE // 2,
        num_warps=4,
        **w.down,
    )
    return t


def _up(
    w: Windows, t: Tensor, b: Tensor, strides: tuple[int, int, int], base: Tensor | None, out: Tensor
) -> None:
    n = out.shape[1]
    rows.up[(w.tiles * triton.cdiv(n, WIDE),)](
        t, b, base, *w.tables, out, *strides, 0 if base is None else base.stride(0), w.count, w.rank, n,
        NB=WIDE, num_warps=4, **w.size,
    )  # fmt: skip


def _outer(w: Windows, t: Tensor, y: Tensor, grad: Tensor, strides: tuple[int, int, int]) -> None:
    n = y.shape[1]
    rows.outer[(w.count * triton.cdiv(n, WIDE),)](
        t, y, w.order, w.offsets, grad, y.stride(0), *strides, w.rank, n, NB=WIDE, num_warps=4, **w.size
    )


def lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """The operator segment_lora: rows in order, two launches."""
    x, base, a, b = (_triton.unit_rows(t) for t in (x, base, a, b))
    out = base.new_empty(base.shape)
    if x.shape[0] == 0 or base.shape[1] == 0 or a.shape[1] == 0:
        return out.copy_(base), x.new_zeros((x.shape[0], a.shape[1]), dtype=torch.float32)
    w = Windows(segment, a.shape[0], a.shape[1], x.dtype)
    with torch.cuda.device_of(x):
        t = _down(w, x, a, a.stride())
        _up(w, t, b, b.stride(), base, out)
    return out, t


def lora_backward(
    dout: Tensor, x: Tensor, a: Tensor, b: Tensor, segment: Tensor, t: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """The operator segment_lora_backward: dt, then a launch for each gradient."""
    dx, da, db = (
        torch.zeros(g.shape, dtype=g.dtype, device=g.device) if need else g.new_empty(0)
        for g, need in zip((x, a, b), needs, strict=True)
    )
    if x.numel() == 0 or dout.shape[1] == 0 or a.shape[1] == 0:
        return dx, da, db
    dout, x, a, b, t = (_triton.unit_rows(g) for g in (dout.to(x.dtype), x, a, b, t.contiguous()))
    w = Windows(segment, a.shape[0], a.shape[1], x.dtype)
    b_w, b_n, b_k = b.stride()
    a_w, a_k, a_c = a.stride()
    with torch.cuda.device_of(x):
        dt = _down(w, dout, b, (b_w, b_k, b_n))
        if needs[0]:
            _up(w, dt, a, (a_w, a_c, a_k), None, dx)
        if needs[1]:
            _outer(w, dt, x, da, da.stride())  # type: ignore[arg-type]
        if needs[2]:
            g_w, g_n, g_k = db.stride()
            _outer(w, t, dout, db, (g_w, g_k, g_n))
    return dx, da, db


def splice(tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor) -> Tensor:
    """The operator splice_embeddings: one launch."""
    tokens, visual = _triton.unit_rows(tokens), _triton.unit_rows(visual)
    learned = visual if special is None else _triton.unit_rows(special)
    out, (t, c) = tokens.new_empty(tokens.shape), tokens.shape
    if t == 0 or c == 0:
        return out
    extra = 0 if special is None else special.shape[0]
    with torch.cuda.device_of(tokens):
        rows.copy_rows[(t,)](
            tokens, visual, learned, index.contiguous(), out, tokens.stride(0), visual.stride(0), learned.stride(0),
            visual.shape[0], extra, c, CB=min(COLUMNS, triton.next_power_of_2(c)), num_warps=4,
        )  # fmt: skip
    return out


def splice_backward(
    dout: Tensor, tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """The operator splice_embeddings_backward: a sort, and a launch for each gradient."""
    none: Any = tokens.new_empty(0)
    dtokens = dvisual = dspecial = none
    if needs[0]:
        extra = 0 if special is None else special.shape[0]
        taken = (index >= 0) & (index < visual.shape[0]) | (index <= -2) & (index >= -1 - extra)
        dtokens = torch.where(taken.unsqueeze(1), 0, dout).to(tokens.dtype)
    dout = _triton.unit_rows(dout)
    if needs[1]:
        dvisual = _gather(dout, index, visual)
    if needs[2] and special is not None:
        dspecial = _gather(dout, -2 - index, special)
    return dtokens, dvisual, dspecial


def _gather(dout: Tensor, index: Tensor, like: Tensor) -> Tensor:
    grad, (count, c) = like.new_empty(like.shape), like.shape
    if count == 0 or c == 0 or dout.shape[0] == 0:
        return grad.zero_()
    found = index.sort(stable=True)
    start = torch.searchsorted(found.values, torch.arange(count + 1, device=index.device, dtype=index.dtype))
    with torch.cuda.device_of(dout):
        rows.gather_rows[(count,)](
            dout, found.indices, start, grad, dout.stride(0), c,
            CB=min(COLUMNS, triton.next_power_of_2(c)), num_warps=4,
        )  # fmt: skip
    return grad
