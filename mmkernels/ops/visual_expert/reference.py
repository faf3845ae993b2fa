"""CogVLM's visual expert, the law. Letters: B batch, L tokens, R = B L rows, C channels, N outputs.

    v[i] = t[i] = 1 and t[i+1] = 1, the last token of a row never                 which tokens are the vision expert's
    h[i] = v[i] ? x[i] w_vision^T + b_vision : x[i] w_text^T + b_text,      out[i] = residual[i] + activation(h[i])
    or, with a table: the first `turned` heads of h[i] turn, (a, b) -> (a cos[i] - b sin[i], b cos[i] + a sin[i])

Types say 1 for begin, patches and end of an image, so the last of every run of ones goes to the text expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives.grouped_linear import reference as grouped


def _place_in_run(ones: Tensor) -> Tensor:
    """How many ones of its run come before each token."""
    at = torch.arange(ones.shape[1], device=ones.device).expand(ones.shape)
    return at - 1 - torch.where(ones, -1, at).cummax(1).values


def expert_mask(token_types: Tensor, image_length: int) -> Tensor:
    """bool [B, L], as transformers' port of CogVLM or, with the patches of an image given, as its training code."""
    ones = token_types == 1
    if image_length:  # images that touch stay apart: each has its own end
        return ones & (_place_in_run(ones) % (image_length + 2) != image_length + 1)
    return ones & F.pad(ones[:, 1:], (0, 1))


def image_positions(token_types: Tensor, mask: Tensor | None, image_length: int) -> Tensor:
    """int64 [B, L]: text counts on, the patches of an image share one number."""
    ones, first = token_types == 1, torch.arange(token_types.shape[1], device=token_types.device) == 0
    if image_length:
        place = _place_in_run(ones) % (image_length + 2)
        inside = ones & (place > 0) & (place <= image_length)
        counts = ~inside | ~F.pad(inside[:, :-1], (1, 0))
        return counts.cumsum(1) - 1
    u = token_types.long() if mask is None else torch.where(mask, token_types, -1).long()
    edge = (F.pad(u[:, :-1], (1, 0)) == 0) | (F.pad(u[:, 1:], (0, 1)) == 0)  # padding (-1) is none
    w = torch.where((u == 1) & edge, 0, u)
    counts = (w == 0) | ((w == 1) & (F.pad(w[:, :-1], (1, 0)) == 0))
    return (counts & ~first).cumsum(1)


def causal_runs(key_mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """lo, hi int32 [B, rows]: the last `rows` tokens see the valid keys up to themselves, which are one run."""
    b, keys = key_mask.shape
    at = torch.arange(keys, dtype=torch.int32, device=key_mask.device)
    last = torch.where(key_mask, at + 1, 0).amax(1, keepdim=True)
    first = torch.where(key_mask, at, keys).amin(1, keepdim=True)
    hi = torch.minimum(at[keys - rows :].expand(b, rows) + 1, last)
    lo = first.expand(b, rows).clamp(max=keys)
    return torch.minimum(lo, last).int().contiguous(), torch.maximum(hi, torch.minimum(lo, last)).int()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(a, _wide(weight), None if bias is None else _wide(bias))


def _is_text(x: Tensor, counts: Tensor) -> Tensor:
    """[R, 1], in group order: text first."""
    return (torch.arange(x.shape[0], device=x.device) < counts[0]).unsqueeze(1)


def _products(
    x: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None,
    b_vision: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rows in group order and h, both wide."""
    a = _wide(x if gather is None else x[gather.long()])
    return a, torch.where(_is_text(x, counts), _linear(a, w_text, b_text), _linear(a, w_vision, b_vision))


def turn(v: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """The first `turned` heads, of twice the table's width, turned half against half by their row's angles; wide."""
    half = cos.shape[1]
    heads = v[:, : 2 * half * turned].unflatten(1, (turned, 2, half))
    a, b = _wide(heads[:, :, 0]), _wide(heads[:, :, 1])
    c, s = (_wide(t).unsqueeze(1) for t in (cos, sin))
    found = torch.stack([a * c - b * s, b * c + a * s], 2).flatten(1)
    return torch.cat([found, _wide(v[:, 2 * half * turned :])], 1)


def forward(
    x: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None,
    b_vision: Tensor | None,
    residual: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    turned: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """out [R, N] (N / 2 for swiglu), and h [R, N] in group order if `keep`, else [0, N]."""
    _, h = _products(x, counts, gather, w_text, w_vision, b_text, b_vision)
    v = grouped.activate(h, activation)
    if scatter is not None:
        v = torch.zeros_like(v).index_copy(0, scatter.long(), v)
    if cos is not None and sin is not None:
        v = turn(v, cos, sin, turned)
    if residual is not None:
        v = v + residual.to(v.dtype)
    out = v.to(x.dtype if residual is None else residual.dtype).contiguous()
    return out, h.to(x.dtype) if keep else x.new_empty(0, h.shape[1])


def backward(
    dout: Tensor,
    x: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    w_text: Tensor,
    w_vision: Tensor,
    b_text: Tensor | None,
    b_vision: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    h: Tensor,
    turned: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """dx, dw_text, dw_vision, db_text, db_vision; [0] for one that nobody `needs`. The law computes h again."""
    a, h = _products(x, counts, gather, w_text, w_vision, b_text, b_vision)
    if cos is not None and sin is not None:
        dout = turn(dout, cos, -sin, turned)
    do = _wide(dout if scatter is None else dout[scatter.long()])
    dh, text = grouped.activate_backward(do, h, activation), _is_text(x, counts)
    dx = torch.where(text, dh @ _wide(w_text), dh @ _wide(w_vision))
    if gather is not None:
        dx = torch.zeros_like(dx).index_copy(0, gather.long(), dx)
    grads = [dx]
    sides = [(torch.where(own, dh, 0), torch.where(own, a, 0)) for own in (text, ~text)]
    grads += [d.T @ rows for d, rows in sides] + [d.sum(0) for d, _ in sides]
    inputs = (x, w_text, w_vision, b_text, b_vision)
    return tuple(
        g.to(t.dtype).contiguous() if need and t is not None else x.new_empty(0)
        for g, t, need in zip(grads, inputs, needs, strict=True)
    )
