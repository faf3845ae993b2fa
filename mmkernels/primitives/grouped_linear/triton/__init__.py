"""Grouped linear in Triton: the plan. Nothing here imports triton; the first call does (launch.py).

Letters: M rows, N outputs and K channels of a tile; E groups, S segments, R rank of LoRA.

**Tiles.** A tile is at most M rows of one group, so there are at most `rows // M + min(rows, E)`: the grid, which shapes
decide. A program finds its group and its rows in the counts, on the device; one beyond the last tile ends at once, and an empty
group has none, so its weights are not read. Neighbouring programs share a tile of the weight.

**Product** (product.py). y[write[i]] = finish(x[read[i]] W^T): rows are read where they are and written where they belong;
bias, LoRA (a product with each segment that meets the tile), activation, scale and residual happen on the sums in registers.
"swiglu" keeps two sums, of gate and up. Bytes: x once for every N outputs, W once for every M rows, out once.

**Backward.** `epilogue_backward` (backward.py): from dout and the kept h to dh, in group order, and the gradients of scale and
residual. dX is the product again, with the weight's strides exchanged and, for LoRA, its two factors; rows that were gathered
are added up in their order by `add_rows`, which finds them by a stable sort of the index on the device. dW is a product over
the rows of a group (`weight_backward`): a program owns N outputs and K channels of one group and walks its rows; too few
programs share the walk in a number of splits that shapes decide, added up in order. dbias falls out of it. No atomics: the same
bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives import _triton
from mmkernels.primitives.grouped_linear import op

_LAUNCH = f"{__name__}.launch"


def _supports(x: Tensor, *_: Any) -> str:
    if x.dtype == torch.float64:
        return "float64 runs on the reference"
    return _triton.refuses(x)


def _supports_backward(dout: Tensor, x: Tensor, *_: Any) -> str:
    return _supports(x)


_triton.register(op.FORWARD, _LAUNCH, "forward", _supports)
_triton.register(op.BACKWARD, _LAUNCH, "backward", _supports_backward)
