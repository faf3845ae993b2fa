"""Which rows see which keys, as data for tests and benchmarks, and the attention that users write today over it.

Rooms that attend lay their inputs out alike, so one description and one eager core serve them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._case import Inputs, generator, uneven_boundaries
from mmkernels.primitives.interval_attention.reference import dropout_keep

Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B,T,H,D], k and v [B,M,G,D] -> [B,T,H,D]
Span = tuple[Tensor, Tensor]  # lo and hi of one sample's rows


def _after(rows: int, starts: list[int]) -> Tensor:
    """How many of `starts` each row has passed."""
    return (torch.arange(rows).unsqueeze(1) >= torch.tensor(starts)).sum(1)


def _images(rows: int, keys: int, parts: int, starts: list[int]) -> Span:
    """Flamingo: each row sees the last of `parts` images, none before the first."""
    time, size = _after(rows, starts), keys // parts
    return (time - 1).clamp(min=0) * size, time * size


def _uneven(rows: int, keys: int, parts: int, sample: int) -> Span:
    return _images(rows, keys, parts, [start + sample for start in uneven_boundaries(rows, parts)])


def _even(rows: int, keys: int, parts: int, sample: int) -> Span:
    return _images(rows, keys, parts, [n * rows // parts for n in range(parts)])


def _all_previous(rows: int, keys: int, parts: int, sample: int) -> Span:
    _, hi = _uneven(rows, keys, parts, sample)
    return torch.zeros_like(hi), hi


def _causal(rows: int, keys: int, parts: int, sample: int) -> Span:
    hi = torch.arange(rows) + 1 + keys - rows
    return torch.zeros_like(hi), hi


def _prefix(rows: int, keys: int, parts: int, sample: int) -> Span:
    lo, hi = _causal(rows, keys, parts, sample)
    return lo, hi.clamp(min=keys // 3)


def _window(rows: int, keys: int, parts: int, sample: int) -> Span:
    _, hi = _causal(rows, keys, parts, sample)
    return (hi - keys // parts).clamp(min=0), hi


def _dense(rows: int, keys: int, parts: int, sample: int) -> Span:
    return torch.zeros(rows, dtype=torch.int64), torch.full((rows,), keys)


def _nothing(rows: int, keys: int, parts: int, sample: int) -> Span:
    lo, _ = _dense(rows, keys, parts, sample)
    return lo, lo


def _packed(rows: int, keys: int, parts: int, sample: int) -> Span:
    """Slices of one image, each attending to itself."""
    edges = torch.tensor([0, *uneven_boundaries(keys, parts), keys])
    part = _after(rows, uneven_boundaries(rows, parts))
    return edges[part], edges[part + 1]


def _any_order(rows: int, keys: int, parts: int, sample: int) -> Span:
    """No order at all, and every fifth row empty."""
    draw = torch.rand(2, rows, generator=generator(17 + sample, "cpu"))
    lo = (draw[0] * keys).long()
    hi = lo + (draw[1] * (keys - lo + 1)).long()
    return lo, torch.where(torch.arange(rows) % 5 == 2, lo, hi)


def _one_image(rows: int, keys: int, parts: int, sample: int) -> Span:
    """Decoding: every row sees the last image of its sample."""
    lo = torch.full((rows,), (parts - 1 - sample % parts) * (keys // parts))
    return lo, lo + keys // parts


MASKS = {
    "uneven": _uneven, "even": _even, "all_previous": _all_previous, "causal": _causal, "prefix": _prefix,
    "window": _window, "dense": _dense, "nothing": _nothing, "packed": _packed, "any_order": _any_order,
    "one_image": _one_image,
}  # fmt: skip


def intervals(z: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi and uniform, each [B,T], local to the sample."""
    batch, rows, keys = z["batch"], z["rows"], z["keys"]
    spans = [MASKS[z["mask"]](rows, keys, z["parts"], sample) for sample in range(max(batch, 1))]
    lo, hi = (torch.stack(side)[:batch] for side in zip(*spans, strict=True))
    uniform = (torch.arange(rows) >= rows - z["overflow"]).expand(batch, rows)
    return torch.where(uniform, 0, lo), torch.where(uniform, keys, hi), uniform.contiguous()


@dataclass(frozen=True)
class Visible:
    """Who sees what, for peers that work sample by sample. lo, hi, uniform are [B,T], local to the sample."""

    lo: Tensor
    hi: Tensor
    uniform: Tensor | None
    keys: int
    alibi_slopes: Tensor | None
    keep: Tensor | None  # bool [B,H,T,M]
    dropout_p: float

    @cached_property
    def mask(self) -> Tensor:
        """bool [B,1,T,M]"""
        j = torch.arange(self.keys, device=self.lo.device)
        return ((j >= self.lo.unsqueeze(-1)) & (j < self.hi.unsqueeze(-1))).unsqueeze(1)

    @cached_property
    def bias(self) -> Tensor | None:
        """ALiBi's, [B,H,T,M]"""
        if self.alibi_slopes is None:
            return None
        j = torch.arange(self.keys, device=self.lo.device)
        distance = j - (self.hi.unsqueeze(-1) - 1)
        return self.alibi_slopes.view(1, -1, 1, 1) * distance.unsqueeze(1)


def visible(x: Inputs) -> Visible:
    """Reads the flat or the 4-D form of a room's inputs: k and v, lo, hi, uniform, `batch`."""
    batch, flat = x["batch"], x["k"].dim() == 3
    rows, keys = (
        (x["lo"].numel() // max(batch, 1), x["k"].shape[0] // batch)
        if flat
        else (x["lo"].shape[1], x["k"].shape[2])
    )
    base = torch.arange(batch, device=x["lo"].device).unsqueeze(1) * (keys if flat else 0)
    lo, hi = (x[name].view(batch, rows) - base for name in ("lo", "hi"))
    uniform, keep, p = x["uniform"], None, x.get("dropout_p", 0.0)
    if p:
        heads = x["q"].shape[1]
        shape = (1, heads, batch * rows, batch * keys) if flat else (batch, heads, rows, keys)
        keep = dropout_keep(x["seed"], p, shape)
        if flat:  # a sample's rows see its own keys: the diagonal blocks
            keep = keep.view(heads, batch, rows, batch, keys).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
    uniform = uniform if uniform is None else uniform.view(batch, rows)
    return Visible(lo, hi, uniform, keys, x.get("alibi_slopes"), keep, p)


def eager_core(see: Visible) -> Core:
    """The public implementations' attention: every row against every key, then a mask, in the input's dtype throughout."""
    if see.keys == 0:
        return lambda q, k, v: q * 0
    hidden, empty = ~see.mask, (see.hi <= see.lo)[:, None, :, None]

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != q.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bjhd->bhtj", q * q.shape[-1] ** -0.5, k)
        if see.bias is not None:
            scores = scores + see.bias.to(scores.dtype)
        if see.uniform is not None:
            scores = scores.masked_fill(see.uniform[:, None, :, None], 0)
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        p = scores.softmax(dim=-1).masked_fill(empty, 0)
        if see.keep is not None:
            p = p * see.keep / (1 - see.dropout_p)
        return torch.einsum("bhtj,bjhd->bthd", p, v)

    return core


def covered(see: Visible) -> int:
    """Keys that some row sees: the others need not be read."""
    batch, _ = see.lo.shape
    edges = torch.zeros(batch, see.keys + 1, dtype=torch.int64, device=see.lo.device)
    some = torch.where(see.hi > see.lo, 1, 0)
    edges.scatter_add_(1, see.lo.long(), some).scatter_add_(1, see.hi.long(), -some)
    return int((edges.cumsum(1)[:, :-1] > 0).sum())
