"""Routing in Triton: the plan. Nothing here imports triton; the first call does (launch.py).

**count**: a program owns ROWS rows and counts them by group, GROUPS groups at a time. **place**: with what all programs before
it counted (a prefix sum over [programs, E], by torch), a program knows where its rows of each group start; a row's rank among
its equals in the block is a prefix sum over the one-hot form [ROWS, GROUPS], which lives in registers. Bytes: ids twice, order
and inverse once, [programs, E] counts. No atomics, no sort, nothing read by the host.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.primitives import _triton
from mmkernels.primitives.routing import op


def _supports(groups: Tensor, *_: Any) -> str:
    return _triton.refuses(groups)


_triton.register(op.OP, f"{__name__}.launch", "route", _supports)
