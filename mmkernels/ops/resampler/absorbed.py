"""Latent attention over media alone that never makes keys or values: cheaper where latents are few beside a head's width.

    scores = (q Wk) x^T,   o = (p x) Wv^T + bv          (a key's bias moves all scores of a row alike, and drops out)

For each head that is 2 L (D + M) C products instead of 2 (D + L) M C and L M D more. A task is one image and as many heads
as fill a product; what it needs stays in cache. Of it only p is kept, which stands where keys and values do otherwise, a small
part of their size. Backward takes its products with x two by two, since both are rows over the same matrix; with t = q Wk and
dc = do Wv

    dp = dc x^T,   ds = p (dp - sum(p dp)),   [dt; c] = [ds; p] x,   dx = [ds; p]^T [t; dc]
    [dWk; dWv] = [q^T dt; do^T c],   dq = dt Wk^T
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmkernels.ops.resampler import products

_ROWS = 512  # of a task's products: heads times latents


def absorbs(
    latents: Tensor, media: Tensor, w_q: Tensor, w_self: Tensor | None, images: int, heads: int
) -> bool:
    """Whether this form is the faster one, by sizes alone: measured on CPUs, with a margin for its smaller products."""
    if (
        media.device.type != "cpu"
        or w_self is not None
        or media.dtype == torch.float64
        or products.native(media)
    ):
        return False
    rows, width, tokens = latents.shape[1], w_q.shape[0] // heads, media.shape[0] / max(images, 1)
    return 0 < 1.25 * rows * (tokens + width) < tokens * width


def _parts(cu_seqlens: Tensor | None, tokens: int, images: int) -> Iterator[tuple[int, slice]]:
    """(image, its media) for every image that has media."""
    edges = [tokens // images * n for n in range(images + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    for n in range(images):
        if edges[n + 1] > edges[n]:
            yield n, slice(edges[n], edges[n + 1])


def _groups(heads: int, rows: int) -> list[slice]:
    step = max(1, _ROWS // rows)
    return [slice(head, min(head + step, heads)) for head in range(0, heads, step)]


def _weights(w_kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Wk and Wv, each [H, D, C], in float32."""
    return w_kv.float().unflatten(0, (2, heads, -1)).unbind(0)  # type: ignore[return-value]


def forward(
    latents: Tensor,
    media: Tensor,
    cu_seqlens: Tensor | None,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    images: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward`, with p [H, L, K] for kv."""
    rows, inner = latents.shape[1], w_q.shape[0]
    width, flat = inner // heads, latents.flatten(0, 1)
    q = products.linear(flat, w_q, b_q, flat.new_empty(flat.shape[0], inner)).view(-1, rows, heads, width)
    wk, wv = _weights(w_kv, heads)
    scaled = (q.float() * width**-0.5).expand(images, -1, -1, -1)
    o, lse = torch.zeros(scaled.shape), torch.full((images, heads, rows), -torch.inf)
    groups, kept = _groups(heads, rows), q.new_empty(heads, rows, media.shape[0])
    space = torch.empty(groups[0].stop, rows, media.shape[1])
    for n, part in _parts(cu_seqlens, media.shape[0], images):
        x = media[part].float()
        for hs in groups:
            t = torch.bmm(scaled[n, :, hs].transpose(0, 1), wk[hs], out=space[: hs.stop - hs.start])
            scores = torch.mm(t.flatten(0, 1), x.t())
            p = scores.softmax(-1)
            lse[n, hs] = (scores.amax(-1) - p.amax(-1).log()).view(-1, rows)  # two passes less than logsumexp
            torch.mm(p, x, out=t.flatten(0, 1))
            kept[hs, :, part] = p.view(-1, rows, p.shape[-1])
            o[n, :, hs] = torch.bmm(t, wv[hs].transpose(1, 2)).transpose(0, 1)
    if b_kv is not None:
        bk, bv = b_kv.float().unflatten(0, (2, heads, -1)).unbind(0)
        o += torch.where((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), 0, bv)
        lse += torch.einsum("nlhd,hd->nhl", scaled, bk)
    o = o.to(q.dtype)
    out = products.linear(o.flatten(2).flatten(0, 1), w_o, b_o, o.new_empty(images * rows, w_o.shape[0]))
    return out.unflatten(0, (images, rows)), q, kept, o, lse


def backward(
    dout: Tensor,
    latents: Tensor,
    media: Tensor,
    cu_seqlens: Tensor | None,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
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
    rows, width, dout = latents.shape[1], w_q.shape[0] // heads, dout.flatten(0, 1)
    do = products.mm(dout, w_o).float().view(images, rows, heads, width)
    took = (lse > -torch.inf).transpose(1, 2).unsqueeze(-1)  # an image without media took nothing
    do = torch.where(took, do, 0)
    scaled = (q.float() * width**-0.5).expand(images, -1, -1, -1)
    dq, dw, dmedia = _through_media(scaled, do, media, cu_seqlens, w_kv, kv, media_grad)
    dtype, flat = media.dtype, latents.flatten(0, 1)
    dq = dq.mul_(width**-0.5)
    dq = (dq.sum(0) if latents.shape[0] != images else dq.flatten(0, 1)).flatten(1).to(dtype)
    empty = (media.new_empty(0) for _ in range(3))
    db_kv = (
        next(empty)
        if b_kv is None
        else torch.cat([torch.zeros(w_q.shape[0]), do.sum((0, 1)).flatten()]).to(dtype)
    )
    return (
        products.mm(dq, w_q).view_as(latents), dmedia, products.weight([dq], flat), products.bias([dq], b_q),
        dw.flatten(0, 2).to(dtype), db_kv, next(empty), next(empty),
        products.weight([dout], o.flatten(2).flatten(0, 1)), products.bias([dout], b_o),
    )  # fmt: skip


def _through_media(
    q: Tensor,
    do: Tensor,
    media: Tensor,
    cu_seqlens: Tensor | None,
    w_kv: Tensor,
    kept: Tensor,
    media_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq of the scaled q, [dWk; dWv] [2, H, D, C] and dmedia (empty unless wanted); q, do [N, L, H, D] in float32."""
    (images, rows, heads, _), (wk, wv) = q.shape, _weights(w_kv, q.shape[2])
    dq, dw = torch.zeros_like(do), torch.zeros(2, *wk.shape)
    dmedia = media.new_zeros(media.shape if media_grad else 0)
    groups = _groups(heads, rows)
    space = torch.empty(2, 2 * groups[0].stop * rows, media.shape[1])
    for n, part in _parts(cu_seqlens, media.shape[0], images):
        x = media[part].float()
        dx = x.new_empty(x.shape if media_grad else 0)
        for hs in groups:
            q_, do_ = (s[n, :, hs].transpose(0, 1) for s in (q, do))
            t = space[0, : 2 * (hs.stop - hs.start) * rows].view(2, hs.stop - hs.start, rows, -1)
            torch.bmm(do_, wv[hs], out=t[1])
            if media_grad:
                torch.bmm(q_, wk[hs], out=t[0])
            dt, context = _task(t, kept[hs, :, part], x, space[1], dx, hs is groups[0])
            dw[0, hs].baddbmm_(q_.transpose(1, 2), dt)
            dw[1, hs].baddbmm_(do_.transpose(1, 2), context)
            dq[n, :, hs] = torch.bmm(dt, wk[hs].transpose(1, 2)).transpose(0, 1)
        if media_grad:
            dmedia[part] = dx
    return dq, dw, dmedia


def _task(
    t: Tensor, kept: Tensor, x: Tensor, space: Tensor, dx: Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    """dt and c, each [h, L, C], of one image and h heads; dx, unless empty, is set by the first task and then added to.

    t: t and dc [2, h, L, C]; kept: p [h, L, M]; x [M, C]; space [at least 2 h L, C], which the results lie in.
    """
    _, heads, rows, width = t.shape
    both = x.new_empty(2, heads * rows, x.shape[0])  # [ds; p]
    ds, p = both
    p.view_as(kept).copy_(kept)
    dp = torch.mm(t[1].flatten(0, 1), x.t(), out=ds)
    torch.mul(p, dp - (p * dp).sum(-1, keepdim=True), out=ds)
    both = both.flatten(0, 1)
    if dx.numel():
        dx.addmm_(both.t(), t.flatten(0, 2), beta=0 if first else 1)
    dt, context = torch.mm(both, x, out=space[: both.shape[0]]).view(2, heads, rows, width)
    return dt, context
