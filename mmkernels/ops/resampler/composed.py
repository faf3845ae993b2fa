"""Latent attention from library products around the kernels of interval attention.

Media and latents are projected by one product each into one packed buffer of keys and values, [media of all images; latents of
all images]: nothing is padded, and no length is read by the host. A few rows that share their weight are one product. A latent
then sees up to two runs of keys, its image's media and its image's latents, and on GPUs the media in several pieces so that few
queries fill the machine; the pieces are merged by their log-sum-exp, in order. What a piece gave is not kept for backward: with
few queries it is made again faster than it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.resampler import absorbed, products
from mmkernels.primitives.interval_attention import reference as attention

_GPU_BLOCKS = 264  # two for each of an H100's multiprocessors
_FEW = 1024  # rows that are copied sooner than a weight is read twice, when media and latents share it
_PIECE = 256  # keys below which a piece is not worth its merge


def _same(w_kv: Tensor, w_self: Tensor | None, b_kv: Tensor | None, b_self: Tensor | None) -> bool:
    """Whether media and latents go through one weight."""

    def place(x: Tensor | None) -> tuple[object, ...]:
        return () if x is None else (x.data_ptr(), x.shape, x.stride())

    return place(w_kv) == place(w_self) and place(b_kv) == place(b_self)


class Sizes(NamedTuple):
    images: int
    latents: int
    heads: int
    width: int
    tokens: int  # media rows of the packed buffer; the latents' follow


class Run(NamedTuple):
    """Rows of the packed buffer as `batch` stacks of keys, and the part of its stack, int32 [batch, rows], that a row sees.

    The rows are all images' latents, once for each of `pieces`.
    """

    batch: int
    rows: slice
    pieces: int
    lo: Tensor
    hi: Tensor

    def stack(self, x: Tensor, z: Sizes) -> Tensor:
        """[N, L, H, D] -> [batch, rows, H, D], once for each piece."""
        each = z.images * z.latents // self.batch
        x = x.reshape(self.batch, 1, each, z.heads, z.width).expand(-1, self.pieces, -1, -1, -1)
        return x.flatten(1, 2)

    def unstack(self, x: Tensor, z: Sizes) -> Tensor:
        """[batch, rows, H, D] -> [pieces, N, L, H, D]."""
        return (
            x.unflatten(1, (self.pieces, -1))
            .transpose(0, 1)
            .reshape(-1, z.images, z.latents, z.heads, z.width)
        )

    def stack_lse(self, lse: Tensor, z: Sizes) -> Tensor:
        """[pieces, N, L, H] -> [batch, H, rows]."""
        return lse.reshape(self.pieces, self.batch, -1, z.heads).permute(1, 3, 0, 2).flatten(2).contiguous()

    def stack_pieces(self, x: Tensor, z: Sizes) -> Tensor:
        """[pieces, N, L, H, D] -> [batch, rows, H, D]."""
        return x.reshape(self.pieces, self.batch, -1, z.heads, z.width).transpose(0, 1).flatten(1, 2)

    def unstack_lse(self, lse: Tensor, z: Sizes) -> Tensor:
        """[batch, H, rows] -> [pieces, N, L, H]."""
        return (
            lse.unflatten(2, (self.pieces, -1)).permute(2, 0, 3, 1).reshape(-1, z.images, z.latents, z.heads)
        )

    def keys(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Packed [J, 2, H, D] -> k and v, each [batch, keys, H, D]."""
        part = kv[self.rows]
        return part.view(self.batch, part.shape[0] // self.batch, *part.shape[1:]).unbind(2)  # type: ignore[return-value]


def pieces(z: Sizes, device: torch.device) -> int:
    """Into how many runs the media of an image are cut."""
    if device.type == "cpu":
        return 1
    blocks = z.images * z.heads * -(-z.latents // 64)
    return max(1, min(-(-_GPU_BLOCKS // blocks), z.tokens // (z.images * _PIECE)))


def _runs(z: Sizes, cu_seqlens: Tensor | None, kv: Tensor) -> Iterator[Run]:
    rows, n, device = kv.shape[0], z.images, kv.device
    if n * z.latents == 0:
        return
    own = (rows - z.tokens) // n
    together = n == 1 and cu_seqlens is None  # one image: its latents' keys stand right behind its media's
    count, batch = pieces(z, device), n if cu_seqlens is None else 1
    if cu_seqlens is None:
        starts = torch.zeros(n, 1, dtype=torch.int32, device=device)
        ends = torch.full_like(starts, rows if together else z.tokens // n)
    else:
        starts, ends = cu_seqlens[:-1].unsqueeze(1), cu_seqlens[1:].unsqueeze(1)
    edges = [starts, *(starts + (ends - starts) * i // count for i in range(1, count)), ends]  # each [N, 1]
    lo, hi = (
        torch.cat(side, 1)
        .view(batch, -1, count, 1)
        .expand(-1, -1, -1, z.latents)
        .transpose(1, 2)
        .reshape(batch, -1)
        for side in (edges[:-1], edges[1:])
    )
    yield Run(batch, slice(0, rows if together else z.tokens), count, lo, hi)
    if own and not together:
        seen = torch.full((n, z.latents), own, dtype=torch.int32, device=device)
        yield Run(n, slice(z.tokens, rows), 1, torch.zeros_like(seen), seen)


class Composed(NamedTuple):
    """The op around one backend's kernels of interval attention."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def forward(
        self,
        latents: Tensor,
        media: Tensor,
        cu_seqlens: Tensor | None,
        w_q: Tensor,
        b_q: Tensor | None,
        w_kv: Tensor,
        b_kv: Tensor | None,
        w_self: Tensor | None,
        b_self: Tensor | None,
        w_o: Tensor,
        b_o: Tensor | None,
        images: int,
        heads: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `reference.forward`."""
        if absorbed.absorbs(latents, media, w_q, w_self, images, heads):
            return absorbed.forward(latents, media, cu_seqlens, w_q, b_q, w_kv, b_kv, w_o, b_o, images, heads)
        z = Sizes(images, latents.shape[1], heads, w_q.shape[0] // heads, media.shape[0])
        rows, inner = latents.flatten(0, 1), w_q.shape[0]
        q = products.linear(rows, w_q, b_q, media.new_empty(rows.shape[0], inner))
        q = q.view(latents.shape[0], z.latents, heads, z.width)
        kv = media.new_empty(z.tokens + (0 if w_self is None else images * z.latents), 2 * inner)
        own, each = kv[z.tokens :], latents.shape[0] == images
        if 0 < len(own) <= len(kv) <= _FEW and each and _same(w_kv, w_self, b_kv, b_self):
            products.linear(torch.cat([media, rows]), w_kv, b_kv, kv)
        else:
            products.linear(media, w_kv, b_kv, kv[: z.tokens])
            if w_self is not None and each:
                products.linear(rows, w_self, b_self, own)
            elif w_self is not None:  # shared latents are projected once
                once = products.linear(rows, w_self, b_self, own.new_empty(z.latents, 2 * inner))
                own.unflatten(0, (images, z.latents)).copy_(once)
        kv = kv.unflatten(1, (2, heads, z.width))
        o, lse = _attend(self, q.expand(images, -1, -1, -1), kv, z, cu_seqlens)
        out = media.new_empty(images * z.latents, w_o.shape[0])
        products.linear(o.flatten(2).flatten(0, 1), w_o, b_o, out)
        return out.unflatten(0, (images, z.latents)), q, kv, o, lse

    def backward(
        self,
        dout: Tensor,
        latents: Tensor,
        media: Tensor,
        cu_seqlens: Tensor | None,
        w_q: Tensor,
        b_q: Tensor | None,
        w_kv: Tensor,
        b_kv: Tensor | None,
        w_self: Tensor | None,
        b_self: Tensor | None,
        w_o: Tensor,
        b_o: Tensor | None,
        q: Tensor,
        kv: Tensor,
        o: Tensor,
        lse: Tensor,
        images: int,
        heads: int,
        media_grad: bool,
    ) -> tuple[Tensor, ...]:
        """As `reference.backward`."""
        if absorbed.absorbs(latents, media, w_q, w_self, images, heads):
            saved, sizes = (q, kv, o, lse), (images, heads, media_grad)
            return absorbed.backward(
                dout, latents, media, cu_seqlens, w_q, b_q, w_kv, b_kv, w_o, b_o, *saved, *sizes
            )
        z = Sizes(images, latents.shape[1], heads, w_q.shape[0] // heads, media.shape[0])
        dout, inner, shared = dout.flatten(0, 1), w_q.shape[0], latents.shape[0] != images
        do = products.mm(dout, w_o).view(images, z.latents, heads, z.width)
        dq, of_media, own = _attend_backward(
            self, do, q.expand(images, -1, -1, -1), kv, o, lse, z, cu_seqlens
        )
        dq = dq.sum(0).flatten(1) if shared else dq.flatten(2).flatten(0, 1)
        rows, to_latents = latents.flatten(0, 1), [(dq, w_q)]
        dw_self, db_self = media.new_empty(0), media.new_empty(0)
        if w_self is not None:
            if shared:
                own = [part.unflatten(0, (images, z.latents)).sum(0) for part in own]
            to_latents += zip(own, w_self.split(inner), strict=True)
            dw_self, db_self = products.weight(own, rows), products.bias(own, b_self)
        to_media = zip(of_media, w_kv.split(inner), strict=True)
        return (
            products.sum_of(*to_latents).view_as(latents), products.sum_of(*to_media) if media_grad else media.new_empty(0),
            products.weight([dq], rows), products.bias([dq], b_q), products.weight(of_media, media),
            products.bias(of_media, b_kv), dw_self, db_self, products.weight([dout], o.flatten(2).flatten(0, 1)),
            products.bias([dout], b_o),
        )  # fmt: skip


def _attend(
    core: Composed, q: Tensor, kv: Tensor, z: Sizes, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o [N, L, H, D] and lse [N, H, L]."""
    outs, lses = [], []
    for run in _runs(z, cu_seqlens, kv):
        out, lse = _forward(core, run, q, kv, z)
        outs.append(run.unstack(out, z))
        lses.append(run.unstack_lse(lse, z))
    if not outs:
        return q.new_empty(q.shape), q.new_empty((z.images, z.heads, z.latents), dtype=torch.float32)
    if len(outs) == 1 and outs[0].shape[0] == 1:
        o, lse = outs[0][0], lses[0][0]
    else:
        o, lse = attention.merge(torch.cat(outs), torch.cat(lses))
    return o.contiguous(), lse.transpose(1, 2).contiguous()


def _forward(core: Composed, run: Run, q: Tensor, kv: Tensor, z: Sizes) -> tuple[Tensor, Tensor]:
    return core.attend(run.stack(q, z), *run.keys(kv), run.lo, run.hi, None, None, None, z.width**-0.5, 0.0)


def _attend_backward(
    core: Composed,
    do: Tensor,
    q: Tensor,
    kv: Tensor,
    o: Tensor,
    lse: Tensor,
    z: Sizes,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dq [N, L, H, D], and dk and dv of the media [tokens, H D] and of the latents [N L, H D]."""
    total, found, runs = torch.zeros_like(do), [], list(_runs(z, cu_seqlens, kv))
    delta = (do.float() * o.float()).sum(-1)
    for run in runs:
        keys, rules = run.keys(kv), (run.lo, run.hi, None, None, None, z.width**-0.5, 0.0)
        if len(runs) == run.pieces == 1:
            given = (
                run.stack(do, z),
                None,
                run.stack(q, z),
                *keys,
                run.stack(o, z),
                run.stack_lse(lse.transpose(1, 2), z),
            )
        else:
            given = _piece_of(run, *_forward(core, run, q, kv, z), do, lse, delta, z)
            given = (*given[:2], run.stack(q, z), *keys, *given[2:])
        dq, *dkv = core.attend_backward(*given, *rules)
        total = total + run.unstack(dq, z).sum(0)
        found.append([part.view(-1, z.heads * z.width) for part in dkv])
    if not found:
        found = [[kv.new_zeros(kv.shape[0], z.heads * z.width)] * 2]
    if len(found) == 2:
        return total, found[0], found[1]
    return total, [part[: z.tokens] for part in found[0]], [part[z.tokens :] for part in found[0]]


def _piece_of(
    run: Run, out: Tensor, lse: Tensor, do: Tensor, merged: Tensor, delta: Tensor, z: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dout and dlse of one run's pieces, beside their out and lse, when `o = sum_n w_n out_n` with `w_n = exp(lse_n - lse)`:
    dout_n = w_n do and dlse_n = w_n <do, out_n - o>."""
    merged = merged.transpose(1, 2)
    weight = (run.unstack_lse(lse, z) - torch.where(merged == -torch.inf, 0, merged)).exp()
    dlse = weight * ((do.float() * run.unstack(out, z).float()).sum(-1) - delta)
    dout = torch.where(do == 0, 0, weight.unsqueeze(-1) * do).to(
        do.dtype
    )  # no gradient, even where the weight is NaN
    return run.stack_pieces(dout, z), run.stack_lse(dlse, z), out, lse
