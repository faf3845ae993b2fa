"""DeepSpeed's gating as its releases 0.9.5 (top 1 and 2) and 0.19 (top k) compute it, in dense tensors, noise as an input.

Each function gives l_aux, the combine weights [S, E, C] and the routes of each expert, as published.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Gating = tuple[Tensor, Tensor, Tensor]


def capacity(tokens: int, experts: int, factor: float, least: int) -> int:
    places = torch.ceil((tokens / experts) * torch.tensor(factor)).to(torch.int64)
    return max(int(places), least)


def _combine(gates: Tensor, slots: Tensor, places: int) -> Tensor:
    """gates [S, E], 0 where nobody goes; slots [S, E]."""
    where = F.one_hot((slots * (gates != 0)).long(), places).float()
    return gates.unsqueeze(2) * where


def top1(
    logits: Tensor, factor: float, least: int, draw: Tensor | None = None, used: Tensor | None = None
) -> Gating:
    p = F.softmax(logits.float(), dim=1)
    s, e = p.shape
    places = capacity(s, e, factor, least)
    mask = F.one_hot(p.argmax(dim=1), e)
    if used is not None:
        mask = torch.einsum("s,se->se", used.to(mask.dtype), mask)
    counts = mask.sum(0)
    l_aux = torch.sum(p.mean(0) * mask.float().mean(0)) * e
    score = mask if draw is None else mask * draw
    best = torch.topk(score, k=min(places, s), dim=0).indices
    mask = mask * torch.zeros_like(mask).scatter_(0, best, 1)
    return l_aux, _combine(p * mask, torch.cumsum(mask, dim=0) - 1, places), counts


def top2(logits: Tensor, factor: float, least: int, gumbel: Tensor | None = None) -> Gating:
    logits = logits.float()
    p = F.softmax(logits, dim=1)
    s, e = p.shape
    places = capacity(s, e, factor * 2, least)
    first = F.one_hot(p.argmax(dim=1), e)
    noisy = logits if gumbel is None else logits + gumbel
    second = F.one_hot(noisy.masked_fill(first.bool(), -math.inf).argmax(dim=1), e)
    slots1 = first.cumsum(0) - 1
    slots2 = second.cumsum(0) - 1 + first.sum(0, keepdim=True)
    counts = first.sum(0)
    l_aux = torch.mean(p.mean(0) * first.float().mean(0)) * e * e
    first, second = first * (slots1 < places), second * (slots2 < places)
    g1, g2 = (p * first).sum(1), (p * second).sum(1)
    total = torch.clamp(g1 + g2, min=torch.finfo(torch.float32).eps)
    g1, g2 = g1 / total, g2 / total
    parts = ((g1, first, slots1), (g2, second, slots2))
    return l_aux, sum(_combine(g.unsqueeze(1) * m, at, places) for g, m, at in parts), counts  # type: ignore[return-value]


def topk(logits: Tensor, k: int, factor: float, least: int, drop: str) -> Gating:
    p = F.softmax(logits.float(), dim=1)
    s, e = p.shape
    places = capacity(s, e, factor * k, least)
    mask = torch.zeros_like(p).scatter(1, p.topk(k, dim=1).indices, 1)
    counts = mask.sum(0)
    l_aux = torch.mean(p.mean(0) * mask.mean(0)) * e * e / k
    if drop == "probs":
        best = torch.topk(p * mask, k=min(places, s), dim=0).indices
        mask = mask * torch.zeros_like(mask).scatter(0, best, 1)
        slots = mask.cumsum(0) - 1
    else:
        slots = mask.cumsum(0) - 1
        mask = mask * (slots < places)
    gates = p * mask
    gates = gates / torch.clamp(gates.sum(1, keepdim=True), min=torch.finfo(torch.float32).eps)
    return l_aux, _combine(gates, slots, places), counts
