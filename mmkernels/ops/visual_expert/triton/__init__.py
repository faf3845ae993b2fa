"""The expert's linear map in Triton: the plan. Nothing here imports triton; the first call does (launch.py).

**Product.** The grouped linear map's kernels with two groups. The weights are two tensors; as all of a device's memory is one
range of addresses, the second one is the first one plus a distance, which is the stride of the groups. Rows are read through
`gather` and written through `scatter` (a permutation), so dX is written to its rows too, where rows of any gather have to be
added up. dW is a product over the rows of one modality, into that parameter's own gradient: text's rows come first, and the
walk of vision leaves them out.

**Turning** (kernels.py). A program owns a row and walks its heads: q and k once in, once out. Backward turns the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.visual_expert import op
from mmkernels.primitives import _triton

_LAUNCH = f"{__name__}.launch"


def _supports(x: Tensor, *_: Any) -> str:
    if x.dtype == torch.float64:
        return "float64 runs on the reference"
    return _triton.refuses(x)


def _supports_backward(dout: Tensor, x: Tensor, *_: Any) -> str:
    return _supports(x)


_triton.register(op.FORWARD, _LAUNCH, "forward", _supports)
_triton.register(op.BACKWARD, _LAUNCH, "backward", _supports_backward)
