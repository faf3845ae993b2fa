"""What users compose for rows that choose their weights, each given its masks and lists for free.

`finish` (bias, LoRA, activation, scale, residual, the way back) is the same for all: plain torch on rows in group order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives._case import Inputs, Unsuited
from mmkernels.primitives.grouped_linear.cases import Plain

MOST = 8  # groups: more products over all rows is not what anybody writes

Run = Callable[[], Tensor]


def packed(x: Inputs) -> Run:
    """The floor: one product for each group over rows as if they stood in group order, nothing moved, nothing after it."""
    plain = Plain(x)
    if len(plain.read) != len(x["x"]) or len(plain.read) == 0:
        raise Unsuited("rows that are read twice, or never, have no such floor")

    def run() -> Tensor:
        parts = zip(x["x"].split(plain.sizes), x["weight"], strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts if len(part)])

    return run


def where(x: Inputs) -> Run:
    """Every group's product over all rows, of which each row keeps one."""
    plain = Plain(x)
    if not 1 < len(x["weight"]) <= MOST:
        raise Unsuited(
            f"{len(x['weight'])} groups: nobody multiplies every row by all of them, nor chooses from one"
        )

    def run() -> Tensor:
        a = x["x"][plain.read]
        h = F.linear(a, x["weight"][0])
        for e in range(1, len(x["weight"])):
            h = torch.where((plain.group == e).unsqueeze(1), F.linear(a, x["weight"][e]), h)
        return plain.finish(x, a, h)

    return run


def loop(x: Inputs) -> Run:
    """One gather, one product for each group, one scatter."""
    plain = Plain(x)

    def run() -> Tensor:
        a = x["x"][plain.read]
        parts = zip(a.split(plain.sizes), x["weight"], strict=True)
        return plain.finish(x, a, torch.cat([F.linear(part, weight) for part, weight in parts]))

    return run


def grouped_mm(x: Inputs) -> Run:
    """torch's own grouped product between a gather and a scatter."""
    plain = Plain(x)
    if len(plain.read) == 0:
        raise Unsuited("torch's grouped product takes no empty matrix")
    if any(
        s % 16
        for s in (x["x"].element_size() * x["x"].shape[1], x["x"].element_size() * x["weight"].shape[1])
    ):
        raise Unsuited("torch's grouped product wants rows of a multiple of 16 bytes")
    ends = torch.tensor(plain.sizes, device=x["x"].device).cumsum(0).to(torch.int32)

    def run() -> Tensor:
        a = x["x"][plain.read]
        return plain.finish(x, a, F.grouped_mm(a, x["weight"].transpose(1, 2), offs=ends))

    return run


FLOORS = ("packed",)  # compute less than they are compared with
PEERS = {"where": where, "packed": packed, "loop": loop, "grouped_mm": grouped_mm}
