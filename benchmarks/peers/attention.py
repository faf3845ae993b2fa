"""What users compose for attention over intervals, each given its metadata for free: masks, run bounds, index tables.

A core takes q [B,T,H,D], k and v [B,M,G,D] and returns [B,T,H,D]; `eager` stands beside the room it judges.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives._case import Unsuited
from mmkernels.primitives._visible import Core, Visible

MAX_CALLS = 256  # a Python loop longer than this is not what anybody writes


class Run(NamedTuple):
    """Neighbouring rows of one sample that see the same keys."""

    sample: int
    start: int
    stop: int
    lo: int
    hi: int
    uniform: bool


def runs(see: Visible) -> list[Run]:
    """Reads the intervals on the host: a luxury that only peers have."""
    uniform = torch.zeros_like(see.lo, dtype=torch.bool) if see.uniform is None else see.uniform
    found = []
    for sample, rows in enumerate(zip(see.lo.tolist(), see.hi.tolist(), uniform.tolist(), strict=True)):
        keyed = list(zip(*rows, strict=True))
        for key, group in groupby(range(len(keyed)), key=keyed.__getitem__):
            members = list(group)
            found.append(Run(sample, members[0], members[-1] + 1, *key))
    return found


def _plain(see: Visible) -> None:
    if see.bias is not None or see.keep is not None:
        raise Unsuited("ALiBi and dropout are left to eager")


def _is_dense(see: Visible) -> bool:
    return bool((see.lo == 0).all()) and bool((see.hi == see.keys).all()) and see.uniform is None


def _is_causal(see: Visible) -> bool:
    rows = torch.arange(see.lo.shape[1], device=see.lo.device, dtype=see.lo.dtype) + 1
    square = see.lo.shape[1] == see.keys and see.uniform is None
    return square and bool((see.lo == 0).all()) and bool((see.hi == rows).all())


def _attend(q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> Tensor:
    """SDPA on token-major tensors, grouped-query where heads differ."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1], **rules).transpose(
        1, 2
    )


def _without_uniform(see: Visible, q: Tensor) -> Tensor:
    """A zero query weighs all keys alike."""
    return q if see.uniform is None else torch.where(see.uniform[..., None, None], 0, q)


def sdpa(see: Visible) -> Core:
    """`scaled_dot_product_attention` with the cheapest description of the mask that it takes."""
    _plain(see)
    if _is_dense(see):
        return _attend
    if _is_causal(see):
        return lambda q, k, v: _attend(q, k, v, is_causal=True)
    mask = see.mask
    return lambda q, k, v: _attend(_without_uniform(see, q), k, v, attn_mask=mask)


def flex(see: Visible) -> Core:
    """FlexAttention with a block mask from the intervals."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _plain(see)
    lo, hi, (batch, rows) = see.lo, see.hi, see.lo.shape

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= lo[b, i]) & (j < hi[b, i])

    blocks = create_block_mask(visible, batch, None, rows, see.keys, device=str(lo.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (_without_uniform(see, q), k, v))
        out = compiled(q, k, v, block_mask=blocks, enable_gqa=k.shape[1] != q.shape[1])
        return out.transpose(1, 2)  # type: ignore[union-attr]

    return core


def segments(see: Visible) -> Core:
    """A Python loop of SDPA calls, one for each run of rows: the best a user composes where images are uneven."""
    _plain(see)
    found = runs(see)
    if _is_dense(see):
        raise Unsuited("every row sees every key: that is sdpa")
    if all(run.lo == run.hi for run in found):
        raise Unsuited("no row sees a key")
    if len(found) > MAX_CALLS:
        raise Unsuited(f"{len(found)} runs of rows would take as many calls")

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
        for run in found:
            rows = q[run.sample : run.sample + 1, run.start : run.stop]
            keys, values = (x[run.sample : run.sample + 1, run.lo : run.hi] for x in (k, v))
            if run.lo == run.hi:
                parts[run.sample].append(torch.zeros_like(rows))
            else:
                rows = torch.zeros_like(rows) if run.uniform else rows
                parts[run.sample].append(_attend(rows, keys, values))
        return torch.cat([torch.cat(part, 1) for part in parts])

    return core


def composed(see: Visible) -> Core:
    """Three batched products over (sample, image, head): only where images are as even as a chessboard."""
    _plain(see)
    found = [run for run in runs(see) if run.sample == 0]
    parts, rows = max(len(found), 1), see.lo.shape[1]
    row, key = rows // parts, see.keys // parts
    even = [Run(0, n * row, (n + 1) * row, n * key, (n + 1) * key, False) for n in range(parts)]
    alike = all(bool((side == side[:1]).all()) for side in (see.lo, see.hi))
    if parts < 2 or found != even or not alike or see.uniform is not None:
        raise Unsuited("the images are not even")

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (parts, -1)).transpose(2, 3) for x in (q, k, v))  # [B,S,H,n,D]
        if k.shape[2] != q.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        p = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        return (p @ v).transpose(2, 3).flatten(1, 2)

    return core


def padded(see: Visible) -> Core:
    """Runs of rows padded to the longest, one batched SDPA over all of them, and the rows gathered back."""
    _plain(see)
    found = [run for run in runs(see) if run.hi > run.lo]
    if len({run.hi - run.lo for run in found}) != 1 or any(run.uniform for run in found):
        raise Unsuited("runs see different numbers of keys")
    if len({run.stop - run.start for run in found}) == 1:
        raise Unsuited("no run needs padding")
    (batch, rows), longest = see.lo.shape, max(run.stop - run.start for run in found)
    spread = torch.arange(longest)
    first = torch.tensor([run.start + run.sample * rows for run in found]).unsqueeze(1)
    last = torch.tensor([run.stop + run.sample * rows - 1 for run in found]).unsqueeze(1)
    real = (first + spread <= last).flatten().nonzero().squeeze(1)  # padded places that hold a row
    reads = [torch.arange(run.lo, run.hi) + run.sample * see.keys for run in found]
    tables = (torch.minimum(first + spread, last), torch.stack(reads), real, (first + spread).flatten()[real])
    rows_of, keys_of, kept, into = (table.to(see.lo.device) for table in tables)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = q.flatten(0, 1)
        keys, values = (x.flatten(0, 1)[keys_of] for x in (k, v))
        out = _attend(flat[rows_of], keys, values).flatten(0, 1)
        return torch.zeros_like(flat).index_copy(0, into, out[kept]).unflatten(0, (batch, rows))

    return core


def varlen(see: Visible) -> Core:
    """torch's packed attention (CUDA): one sequence for each run of rows, no padding, bounds on the host."""
    _plain(see)
    found = runs(see)
    if see.lo.device.type != "cuda":
        raise Unsuited("varlen_attn runs on CUDA alone")
    ends = [run.hi + run.sample * see.keys for run in found]
    starts = [run.lo + run.sample * see.keys for run in found]
    if starts[0] != 0 or starts[1:] != ends[:-1] or any(run.uniform for run in found):
        raise Unsuited("runs do not see consecutive keys")
    from torch.nn.attention.varlen import varlen_attn

    rows = [run.start + run.sample * see.lo.shape[1] for run in found] + [see.lo.numel()]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=see.lo.device) for x in (rows, [0, *ends]))
    longest_q = max(run.stop - run.start for run in found)
    longest_k = max(run.hi - run.lo for run in found)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != q.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        flat, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(flat, keys, values, cu_q, cu_k, longest_q, longest_k).view_as(q)  # type: ignore[union-attr]

    return core


CORES = {
    "sdpa": sdpa,
    "flex": flex,
    "segments": segments,
    "composed": composed,
    "padded": padded,
    "varlen": varlen,
}
