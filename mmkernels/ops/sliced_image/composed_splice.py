"""Splicing on CPU: every row of the output copied once from where it stands, every gradient gathered in order."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import splice
from mmkernels.primitives._op import LIBRARY

KERNELS = ("splice_rows__cpu", "splice_gather__cpu")
LIBRARY.define(f"{KERNELS[0]}(Tensor tokens, Tensor visual, Tensor? special, Tensor index) -> Tensor")
LIBRARY.define(f"{KERNELS[1]}(Tensor dout, Tensor index, Tensor like) -> Tensor")


def forward(tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor) -> Tensor:
    """The operator splice_embeddings."""
    return getattr(torch.ops.mmkernels, KERNELS[0]).default(
        tokens, visual, special, index.long().contiguous()
    )


def backward(
    dout: Tensor, tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """The operator splice_embeddings_backward."""
    gather, index = getattr(torch.ops.mmkernels, KERNELS[1]).default, index.long().contiguous()
    none = tokens.new_empty(0)
    dtokens = dvisual = dspecial = none
    if needs[0]:
        learned = 0 if special is None else special.shape[0]
        taken = (index >= 0) & (index < visual.shape[0]) | (index <= -2) & (index >= -1 - learned)
        dtokens = torch.where(taken.unsqueeze(1), 0, dout)
    if needs[1]:
        dvisual = gather(dout, index, visual)
    if needs[2] and special is not None:
        dspecial = gather(dout, -2 - index, special)
    return dtokens, dvisual, dspecial


def _present() -> str:
    missing = [
        n for n in KERNELS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{n}", "CPU")
    ]
    return f"{missing[0]} is not compiled in this installation" if missing else ""


def _supports(*tensors: Tensor | None) -> str:
    return (
        "float64 runs on the reference"
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else ""
    )


splice.FORWARD.register("cpu", "cpp", forward, supports=lambda *args: _supports(*args[:3]), present=_present)
splice.BACKWARD.register(
    "cpu", "cpp", backward, supports=lambda *args: _supports(*args[:4]), present=_present
)
