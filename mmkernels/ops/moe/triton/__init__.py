"""Mixtures of experts in Triton: the plan. Nothing here imports triton; the first call does (launch.py).

**Router** (kernels.py). Two launches around a prefix sum over [blocks, E]: `choose` owns a block of tokens with all their
experts in registers; `arrive` knows from the sums where its routes to each expert start, and a route's rank in the block is a
prefix sum over the one-hot form. Bytes: logits once, ids and weights twice. No atomics, no sort, nothing read by the host.
Policies that keep the best routes instead of the first need a sort: the law has one.

**Experts.** The grouped linear map's kernels: rows of x are read through the order of the routes, the activation is in the
epilogue, the second product reads rows where they stand. `combine` adds up the rows of a token in the order of its choices. The
gradient of a route's weight is <d middle, middle>, so the rows that were weighted are never needed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.moe import op, route
from mmkernels.ops.moe.reference import RULES
from mmkernels.primitives import _triton

_LAUNCH = f"{__name__}.launch"
MOST_EXPERTS, MOST_ROUTES = 1024, 16


def _supports(x: Tensor, *_: Any) -> str:
    return "float64 runs on the reference" if x.dtype == torch.float64 else _triton.refuses(x)


def _supports_backward(dout: Tensor, x: Tensor, *_: Any) -> str:
    return _supports(x)


def _router(logits: Tensor, k: int) -> str:
    if logits.shape[1] > MOST_EXPERTS or k > MOST_ROUTES:
        return f"{logits.shape[1]} experts, {k} routes: it takes {MOST_EXPERTS} and {MOST_ROUTES}"
    return _supports(logits)


def _supports_route(
    logits: Tensor, noise: Tensor | None, mask: Any, k: int, capacity: int, policy: str, *_: Any
) -> str:
    drop = RULES[policy].drop
    if capacity >= 0 and (drop == "probs" or (drop == "noise" and noise is not None)):
        return f"{policy} keeps the best routes, which is a sort: the reference has it"
    return _router(logits, k)


def _supports_route_backward(dweights: Tensor, daux: Tensor, dz: Tensor, logits: Tensor, *rest: Any) -> str:
    return _router(logits, rest[1].shape[1])


_triton.register(route.FORWARD, _LAUNCH, "route", _supports_route)
_triton.register(route.BACKWARD, _LAUNCH, "route_backward", _supports_route_backward)
_triton.register(op.FORWARD, _LAUNCH, "forward", _supports)
_triton.register(op.BACKWARD, _LAUNCH, "backward", _supports_backward)
