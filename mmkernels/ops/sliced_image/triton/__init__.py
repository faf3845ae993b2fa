"""Packed slices in Triton: the plan. Nothing here imports triton; the first call does (launch.py, launch_rows.py).

**Attention** (kernels.py). Tiles of rows never leave their slice: a table of tiles is made on the device, as many as any
slices of so many rows can need. A program owns M rows of one head and walks the keys of its slice from the slice's own first
one, so a slice's sums do not depend on where it stands. Bytes: q, out, lse once; k and v once a tile. Backward: `backward_q`
walks keys as forward does, `backward_kv` owns N keys and walks the slice's rows. No atomics.

**Low-rank updates** (rows.py). Rows are brought into the order of their windows by `route_groups`; `down` makes K numbers of a
row, `up` adds their product with b to the row as it is written, `outer` sums a window's rows into its gradient, in order.

**Splicing** (rows.py). A program owns a row of the output and copies it from where it stands. Backward: rows in the order of
what they were read from, by a stable sort; a program owns a row of the gradient and adds up its readers in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import attention, lora, splice
from mmkernels.primitives import _triton
from mmkernels.primitives.interval_attention.op import kernel_head_dim

_ATTENTION, _ROWS = f"{__name__}.launch", f"{__name__}.launch_rows"


def _attends(q: Tensor, *_: Any) -> str:
    return kernel_head_dim(q) or _triton.refuses(q)


def _attends_back(dout: Tensor, q: Tensor, *_: Any) -> str:
    return _attends(q)


def _adds(x: Tensor, *rest: Any) -> str:
    if x.dtype == torch.float64:
        return "float64 runs on the reference"
    return _triton.refuses(x)


def _copies(*args: Any) -> str:
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in args):
        return "float64 runs on the reference"
    return "" if args[0].is_cuda else _triton.refuses(args[0])


_triton.register(attention.FORWARD, _ATTENTION, "forward", _attends)
_triton.register(attention.BACKWARD, _ATTENTION, "backward", _attends_back)
_triton.register(lora.FORWARD, _ROWS, "lora", _adds)
_triton.register(lora.BACKWARD, _ROWS, "lora_backward", _adds)
_triton.register(splice.FORWARD, _ROWS, "splice", _copies)
_triton.register(splice.BACKWARD, _ROWS, "splice_backward", _copies)
