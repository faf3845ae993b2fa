"""Top-k mixtures of experts, the law. Letters: T tokens, E experts, K routes of a token, C channels, F hidden width.

    p = softmax(logits)                    experts[t, :] = the K largest logits + noise, the lowest id first among equals
    w = p[experts], divided by its sum before routes are dropped, or over the kept ones after, or not at all
    out[t] = sum_j w[t, j] ffn_e(x[t])     e = experts[t, j], over the kept routes; ffn_e = w_out[e] act(w_in[e] x)

Route t K + j of expert e has a slot there: how many routes of e come before it. Routes come token by token, or (top 2 as
published) all first choices, then all second ones. With a capacity an expert keeps its first routes, or those of the largest
draw (top 1's random selection) or p. A logit that is NaN counts as the lowest number, an infinite one as the largest or lowest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.primitives.grouped_linear import reference as grouped
from mmkernels.primitives.routing import reference as routing

EPS = torch.finfo(torch.float32).eps  # the published floor of a renormalising sum

Routes = tuple[Tensor, ...]


class Rule(NamedTuple):
    """What a policy means: `choices` all first choices come before any second one, `drop` who stays in a full expert."""

    choices: bool
    drop: str  # "position", or by the largest "noise" or "probs"
    normalize: str  # "before", "after", "" for raw probabilities
    balance: str


RULES = {
    "dropless": Rule(False, "", "before", "mixtral"),
    "topk_capacity": Rule(False, "position", "before", "megablocks"),
    "deepspeed_top1": Rule(False, "noise", "", "deepspeed"),
    "deepspeed_top2": Rule(True, "position", "after", "deepspeed"),
    "deepspeed_position": Rule(False, "position", "after", "megablocks"),
    "deepspeed_probs": Rule(False, "probs", "after", "megablocks"),
}


def finite(logits: Tensor) -> Tensor:
    """Wide, NaN the lowest number, infinities the largest and lowest: any row then has a softmax."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    most = torch.finfo(wide.dtype).max
    return torch.where(wide.isnan(), -most, wide).clamp(-most, most)


def choose(logits: Tensor, noise: Tensor | None, k: int, policy: str) -> Tensor:
    """experts [T, K] int64: the largest first, the lowest id among equals, never one twice."""
    if noise is None or policy == "deepspeed_top1":
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    noisy = finite(logits + noise.to(logits.dtype))
    if policy == "deepspeed_top2":  # the first choice is by the logits alone
        first = logits.sort(dim=1, descending=True, stable=True).indices[:, :1]
        noisy = noisy.scatter(1, first, -torch.inf)
        return torch.cat([first, noisy.sort(dim=1, descending=True, stable=True).indices[:, :1]], 1)
    return noisy.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _slots(ids: Tensor, experts: int) -> Tensor:
    """How many routes of the same expert come before each."""
    _, offsets, _, inverse, _, _ = routing.forward(ids, experts, 1)
    return inverse - offsets[ids.clamp(max=experts - 1).long()]


def _keep(ids: Tensor, experts: int, capacity: int, score: Tensor | None) -> Tensor:
    """Which routes find a place; ids int32 in the order of arrival, `experts` for none."""
    if capacity < 0:
        return ids < experts
    if score is None:
        return (_slots(ids, experts) < capacity) & (ids < experts)
    best = score.sort(descending=True, stable=True).indices
    slots = torch.empty_like(ids).scatter_(0, best, _slots(ids[best].contiguous(), experts))
    return (slots < capacity) & (ids < experts)


def _arrive(routes: Tensor, choices: bool) -> Tensor:
    """Routes [T, K] in the order in which they get their slots."""
    return (routes.t() if choices else routes).reshape(-1)


def _place(kept: Tensor, experts: int, choices: bool) -> tuple[Tensor, Tensor, Tensor]:
    """order, inverse, counts of the kept routes [T, K], `experts` for those that are not."""
    t, k = kept.shape
    counts, _, order, inverse, _, _ = routing.forward(_arrive(kept, choices).contiguous(), experts, 1)
    if choices:
        order = torch.where(order < 0, -1, order % max(t, 1) * k + order // max(t, 1))
        inverse = inverse.view(k, t).t().reshape(-1)
    return order.to(torch.int32), inverse, counts


def normalize(p: Tensor, kept: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """weights and what they were divided by [T, 1], of the chosen probabilities [T, K]."""
    w = torch.where(kept, p, 0)
    if how == "before":
        total = p.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    elif how == "after":
        total = w.sum(1, keepdim=True).clamp(min=EPS)
    else:
        total = p.new_ones(p.shape[0], 1)
    return w / total, total


class Losses(NamedTuple):
    """What both losses need: aux = sum_e share[e] sum_t counted[t] p[t, e], z = sum_t square[t] lse[t]^2."""

    share: Tensor
    counted: Tensor
    square: Tensor


def losses(logits: Tensor, mask: Tensor | None, experts: Tensor, policy: str, balance: str) -> Losses:
    """Published top 1 with unused tokens averages over all tokens; everything else over those that count."""
    t, e = logits.shape
    wide = finite(logits[:0]).dtype
    used = torch.ones(t, dtype=torch.bool, device=logits.device) if mask is None else mask
    every = torch.arange(e, device=logits.device)
    chosen = experts[:, :1] if balance == "deepspeed" else experts
    hits = torch.zeros(e, dtype=wide, device=logits.device)
    for j in range(chosen.shape[1]):
        hits = hits + ((chosen[:, j : j + 1] == every) & used.unsqueeze(1)).sum(0)
    count = used.sum().clamp(min=1).to(wide)
    counted = used.to(wide) / count
    if policy == "deepspeed_top1":
        count = torch.full_like(count, max(t, 1))
        counted = torch.full((t,), 1 / max(t, 1), dtype=wide, device=logits.device)
    scale = e / experts.shape[1] if balance == "megablocks" else e
    return Losses(scale * hits / count, counted, torch.where(sane(logits) & used, counted, 0))


def sane(logits: Tensor) -> Tensor:
    """[T] rows without NaN and +inf and with a number: others have a choice, but neither a z-loss nor a gradient."""
    return ~(logits.isnan() | logits.isposinf()).any(1) & ~logits.isneginf().all(1)


def forward(
    logits: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    k: int,
    capacity: int,
    policy: str,
    renormalize: str,
    balance: str,
) -> Routes:
    """weights [T, K]; experts [T, K], order [T K], inverse [T K], counts [E], chosen [E] int32; aux_loss, z_loss []."""
    e, rule = logits.shape[1], RULES[policy]
    lowered = finite(logits)
    experts = choose(lowered, noise, k, policy)
    p = lowered.softmax(1)
    chosen = p.gather(1, experts)
    ids = experts.to(torch.int32)
    if mask is not None:
        ids = torch.where(mask.unsqueeze(1), ids, e)
    score = _score(rule.drop, chosen, noise, experts)
    arriving = _arrive(ids, rule.choices).contiguous()
    kept = _keep(arriving, e, capacity, score)
    kept = kept.view(k, -1).t().contiguous() if rule.choices else kept.view(-1, k)
    order, inverse, counts = _place(torch.where(kept, ids, e), e, rule.choices)
    weights, _ = normalize(chosen, kept, renormalize)
    loss = losses(logits, mask, experts, policy, balance)
    aux = (loss.share * (loss.counted.unsqueeze(1) * p).sum(0)).sum()
    z = (loss.square * torch.where(loss.square > 0, lowered.logsumexp(1), 0).square()).sum()
    selected = routing.forward(ids.reshape(-1), e, 1)[0]
    return weights, experts.to(torch.int32), order, inverse, counts, selected, aux, z


def _score(drop: str, chosen: Tensor, noise: Tensor | None, experts: Tensor) -> Tensor | None:
    """What decides who stays, [T K]; None: who comes first."""
    if drop == "probs":
        return chosen.reshape(-1)
    if drop == "noise" and noise is not None:
        return finite(noise).gather(1, experts).reshape(-1)
    return None


def backward(
    dweights: Tensor,
    daux: Tensor,
    dz: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    experts: Tensor,
    inverse: Tensor,
    policy: str,
    renormalize: str,
    balance: str,
) -> Tensor:
    """dlogits, through the weights and both losses; the choice itself has no gradient."""
    lowered, kept = finite(logits), inverse.view(experts.shape) >= 0
    p, ids = lowered.softmax(1), experts.long()
    chosen = p.gather(1, ids)
    weights, total = normalize(chosen, kept, renormalize)
    dw = torch.where(kept, dweights, 0)
    dp = dw / total
    if renormalize:
        floor = EPS if renormalize == "after" else torch.finfo(p.dtype).tiny
        dp = dp - torch.where(total > floor, (dw * weights).sum(1, keepdim=True) / total, 0)
        if renormalize == "after":
            dp = torch.where(kept, dp, 0)
    loss = losses(logits, mask, experts, policy, balance)
    grown = daux * loss.counted.unsqueeze(1) * loss.share
    grown = grown.expand(p.shape).contiguous().scatter_add(1, ids, dp)
    dlogits = p * (grown - (grown * p).sum(1, keepdim=True))
    lse = torch.where(loss.square > 0, lowered.logsumexp(1), 0)
    dlogits = dlogits + p * (2 * dz * loss.square * lse).unsqueeze(1)
    return torch.where(sane(logits).unsqueeze(1), dlogits, 0).to(logits.dtype)


def _rows(order: Tensor, weights: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The token and the weight of each row in the experts' order; the token is -1 past the last row."""
    routes, k = weights.numel(), weights.shape[1]
    some = (order >= 0) & (order < routes)
    token = torch.where(some, order // k, -1).to(torch.int32)
    flat = torch.cat([weights.reshape(-1), weights.new_zeros(1)])
    return token, flat[torch.where(some, order, routes).long()]


def experts_forward(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """out [T, C], and h [T K, N] before the activation (no row of it unless kept)."""
    m, token = order.shape[0], _rows(order, weights, counts)[0]
    none = (None, None, None, None, None)
    a, h = grouped.forward(x, w_in, counts, token, None, b_in, *none, activation, m, True)
    y, _ = grouped.forward(a, w_out, counts, None, None, b_out, *none, "", m, False)
    return combine(y, weights, inverse), h if keep else h[:0]


def combine(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """out[t] = sum_j weights[t, j] y[inverse[t K + j]], j after j, in y's dtype; a route without a row adds nothing."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = torch.zeros((weights.shape[0], y.shape[1]), dtype=wide, device=y.device)
    at = inverse.view(weights.shape).long()
    padded = torch.cat([y, y.new_zeros(1, y.shape[1])])
    for j in range(weights.shape[1]):
        some = (at[:, j] >= 0) & (at[:, j] < y.shape[0])
        row = padded[torch.where(some, at[:, j], y.shape[0])].to(wide)
        out = out + torch.where(some, weights[:, j].to(wide), 0).unsqueeze(1) * row
    return out.to(y.dtype)


def experts_backward(
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    h: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """dx, dweights, dw_in, dw_out, db_in, db_out; [0] where nobody needs one. `h` is for kernels: the law computes it again."""
    m, (token, scale) = order.shape[0], _rows(order, weights, counts)
    none = (None, None, None)
    a, h = grouped.forward(x, w_in, counts, token, None, b_in, None, None, *none, activation, m, True)
    some = (token >= 0).unsqueeze(1)
    dy = torch.where(some, torch.cat([dout, dout.new_zeros(1, dout.shape[1])])[token.long()], 0)
    through = [needs[0] or needs[2] or needs[4], needs[3], needs[5], needs[1], False, False, False]
    first = (a, w_out, counts, None, None, b_out, scale, None, *none, h)
    da, dw_out, db_out, dscale, *_ = grouped.backward(dy.contiguous(), *first, "", m, through)
    dx = dw_in = db_in = x.new_empty(0)
    if through[0]:
        second = (x, w_in, counts, token, None, b_in, None, None, *none, h)
        back = [needs[0], needs[2], needs[4], False, False, False, False]
        dx, dw_in, db_in, *_ = grouped.backward(da, *second, activation, m, back)
    dweights = x.new_empty(0)
    if needs[1]:
        at, padded = inverse.long(), torch.cat([dscale, dscale.new_zeros(1)])
        found = padded[torch.where((at >= 0) & (at < m), at, m)]
        dweights = found.view(weights.shape).to(weights.dtype)
    return dx, dweights, dw_in, dw_out, db_in, db_out
