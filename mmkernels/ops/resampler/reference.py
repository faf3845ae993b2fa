"""Few queries over long media, the law. N images (or videos), L latents, K media tokens of all images, H heads, D head width.

    q = l Wq^T + bq;  [k; v] = x Wkv^T + bkv over an image's media x, and with Wself over its latents: l Wself^T + bself
    out = (softmax(q k^T / sqrt(D)) v) Wo^T + bo                          an image without keys: out = bo

Widened to float32 (float64 stays). Backward by the chain rule, line for line.

Q-Former: which rows see which keys, N queries before L text tokens in every sample.

    mode        query -> query   query -> text   text -> query   text -> text
    itc         all              -               -               valid
    itg         all              -               all             valid, up to itself
    itm         all              valid           all             valid
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def qformer_intervals(
    text_mask: Tensor, num_query: int, split: bool, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi int32 and order int64, each [B, N + L]: row r sees the keys order[lo[r]], ..., order[hi[r] - 1].

    The order puts a sample's valid text right behind its queries and padding last, so that what a row sees is one run.
    """
    b, length = text_mask.shape
    valid = text_mask.long()
    so_far, total = valid.cumsum(1), valid.sum(1, keepdim=True)
    padding_so_far = (1 - valid).cumsum(1)
    place = torch.where(text_mask, so_far, total + padding_so_far) - 1
    text = torch.arange(length, device=valid.device).expand(b, length)
    text_order = torch.zeros_like(place).scatter(1, place, text)
    queries = torch.arange(num_query, device=valid.device).expand(b, num_query)
    order = torch.cat([queries, num_query + text_order], 1)

    query_sees = (torch.zeros_like(total) if split or causal else total).expand(b, num_query)
    text_sees = so_far if causal else total.expand(b, length)
    hi = num_query + torch.cat([query_sees, text_sees], 1)
    lo = torch.cat([torch.zeros_like(query_sees), torch.full_like(text_sees, num_query if split else 0)], 1)
    return lo.int(), hi.int(), order


def _wide(*tensors: Tensor | None) -> list[Tensor]:
    dtype = torch.promote_types(next(t for t in tensors if t is not None).dtype, torch.float32)
    return [t if t is None else t.to(dtype) for t in tensors]  # type: ignore[misc]


def _by_image(rows: Tensor, cu_seqlens: Tensor | None, images: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Packed rows [J, ...], `tokens` of media and then the latents', as every image's own keys [N, keys, ...], and bool
    [N or 1, keys]: which of them are there. Ragged media are J keys for every image, zeroed where they are another's."""
    if cu_seqlens is None:
        parts = (
            part.reshape(images, part.shape[0] // max(images, 1), *rows.shape[1:])
            for part in rows.tensor_split([tokens])
        )
        keys = torch.cat(list(parts), 1)
        return keys, torch.ones(1, keys.shape[1], dtype=torch.bool, device=rows.device)
    j, image = torch.arange(rows.shape[0], device=rows.device), torch.arange(images, device=rows.device)
    of_media = torch.searchsorted(cu_seqlens[1:].contiguous(), j.to(cu_seqlens.dtype), right=True)
    of_latents = (j - tokens) // max((rows.shape[0] - tokens) // max(images, 1), 1)
    own = torch.where(j < tokens, of_media, of_latents) == image[:, None]
    return torch.where(own[:, :, None, None, None], rows, 0), own


def _to_rows(keys: Tensor, own: Tensor, cu_seqlens: Tensor | None, latents: int) -> Tensor:
    """The inverse of `_by_image`, for gradients: packed rows again."""
    if cu_seqlens is not None:
        return torch.where(own[:, :, None, None, None], keys, 0).sum(0)
    media = keys.shape[1] - latents
    return torch.cat([keys[:, :media].flatten(0, 1), keys[:, media:].flatten(0, 1)])


def _attend(q: Tensor, k: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [N, H, L, keys] (all zero where nothing is seen) and log-sum-exp [N, H, L]."""
    scores, seen = torch.einsum("nlhd,njhd->nhlj", q, k) / math.sqrt(q.shape[-1]), own[:, None, None]
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
    top = scores.amax(-1, keepdim=True)
    e = (scores - top).exp() * seen
    total = e.sum(-1, keepdim=True)
    nothing = total == 0
    lse = torch.where(nothing, -torch.inf, top + total.log())
    return e / torch.where(nothing, 1, total), lse.squeeze(-1)


def _project(
    latents: Tensor,
    media: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_self: Tensor | None,
    b_self: Tensor | None,
    images: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """q [N or 1, L, H, D], and keys and values of media, then of latents: [J, 2, H, D]."""
    q = F.linear(latents, w_q, b_q).unflatten(-1, (heads, -1))
    kv = F.linear(media, w_kv, b_kv)
    if w_self is not None:
        own = F.linear(latents, w_self, b_self).expand(images, -1, -1)
        kv = torch.cat([kv, own.flatten(0, 1)])
    return q, kv.unflatten(-1, (2, heads, q.shape[-1]))


def forward(
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
    """out [N,L,Co] and what backward wants: q [N or 1,L,H,D], kv [J,2,H,D], o [N,L,H,D], lse [N,H,L]."""
    l_, x_, wq, bq, wkv, bkv, ws, bs, wo, bo = _wide(
        latents, media, w_q, b_q, w_kv, b_kv, w_self, b_self, w_o, b_o
    )
    q, kv = _project(l_, x_, wq, bq, wkv, bkv, ws, bs, images, heads)
    keys, own = _by_image(kv, cu_seqlens, images, media.shape[0])
    p, lse = _attend(q.expand(images, -1, -1, -1), keys[:, :, 0], own)
    o = torch.einsum("nhlj,njhd->nlhd", p, keys[:, :, 1])
    out = F.linear(o.flatten(2), wo, bo)
    dtype = latents.dtype
    return out.to(dtype), q.to(dtype), kv.to(dtype).contiguous(), o.to(dtype).contiguous(), lse.contiguous()


def attention_weights(q: Tensor, kv: Tensor, lse: Tensor, tokens: int) -> Tensor:
    """Probabilities [N, H, L, keys] from what `forward` returned for media of one length, `tokens` rows of it."""
    keys, _ = _by_image(kv.to(lse.dtype), None, lse.shape[0], tokens)
    scores = torch.einsum("nlhd,njhd->nhlj", q.to(lse.dtype).expand(lse.shape[0], -1, -1, -1), keys[:, :, 0])
    return (scores / math.sqrt(q.shape[-1]) - lse.unsqueeze(-1)).exp()


def packed_weights(q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, images: int) -> Tensor:
    """Probabilities [H, L, K] of media alone: for every packed token, how much the latents of its image see it."""
    q_, kv_ = _wide(q.expand(images, -1, -1, -1), kv)
    keys, own = _by_image(kv_, cu_seqlens, images, kv.shape[0])
    p, _ = _attend(q_, keys[:, :, 0], own)
    p = p.transpose(0, 1).transpose(1, 2)  # [H, L, N, keys]
    return (p.flatten(2) if cu_seqlens is None else p.sum(2)).to(q.dtype)


def backward(
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
    """dlatents, dmedia (empty without `media_grad`), then the gradients of the eight weights; an absent one's is empty."""
    l_, x_, wq, bq, wkv, bkv, ws, bs, wo, do_ = _wide(
        latents, media, w_q, b_q, w_kv, b_kv, w_self, b_self, w_o, dout
    )
    q_, kv_ = _project(l_, x_, wq, bq, wkv, bkv, ws, bs, images, heads)
    q_, tokens, rows = q_.expand(images, -1, -1, -1), media.shape[0], latents.shape[1]
    keys, own = _by_image(kv_, cu_seqlens, images, tokens)
    k, v = keys.unbind(2)
    p, _ = _attend(q_, k, own)
    o_ = torch.einsum("nhlj,njhd->nlhd", p, v)
    do = (do_ @ wo).unflatten(-1, (heads, -1))
    dp = torch.einsum("nlhd,njhd->nhlj", do, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q_.shape[-1])
    dq = torch.einsum("nhlj,njhd->nlhd", ds, k).flatten(2)
    dk = torch.einsum("nhlj,nlhd->njhd", ds, q_)
    dv = torch.einsum("nhlj,nlhd->njhd", p, do)
    dkv = _to_rows(torch.stack([dk, dv], 2), own, cu_seqlens, rows if w_self is not None else 0).flatten(1)
    dmedia_kv, dself = dkv[:tokens], dkv[tokens:]
    dl = dq @ wq
    dw_self = media.new_empty(0)
    if ws is not None:
        dself = dself.unflatten(0, (images, rows))
        dl, dw_self = dl + dself @ ws, _weight(dself, l_)
    grads = (
        dl.sum_to_size(latents.shape), dmedia_kv @ wkv if media_grad else media.new_empty(0), _weight(dq, l_), _bias(dq, b_q),
        _weight(dmedia_kv, x_), _bias(dmedia_kv, b_kv), dw_self, _bias(dself, b_self),
        _weight(do_, o_.flatten(2)), _bias(do_, b_o),
    )  # fmt: skip
    return tuple(g.to(latents.dtype).contiguous() for g in grads)


def _weight(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight behind dy = d(x w^T); x may be shared by all images."""
    x = x.expand(*dy.shape[:-1], x.shape[-1])
    return dy.flatten(0, -2).T @ x.flatten(0, -2)


def _bias(dy: Tensor, bias: Tensor | None) -> Tensor:
    return dy.new_empty(0) if bias is None else dy.flatten(0, -2).sum(0)
