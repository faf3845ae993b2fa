"""The library products of a layer, in float32 on CPUs that have no fast product of narrower numbers.

There torch multiplies bfloat16 and float16 several times slower than float32; widening the operands costs a pass over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _native

_ROWS = 1024  # of a wide copy: it is there only while its product is made


def native(x: Tensor) -> bool:
    """Whether x is of a narrow dtype that the device multiplies as fast as float32, or faster."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if x.device.type != "cpu":
        return True
    features = {} if _native.host is None else _native.host.cpu_features()
    return x.dtype == torch.bfloat16 and any(features.get(name, False) for name in ("amx-bf16", "avx512bf16"))


def _widens(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and not native(x)


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, into `out` if given."""
    if not _widens(a):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    wide = torch.mm(a.float(), b.float())
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """x w^T + b for rows x, straight into `out`."""
    if not _widens(x):
        return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)
    w = w.float().t()
    for part, place in zip(x.split(_ROWS), out.split(_ROWS), strict=True):
        wide = torch.mm(part.float(), w)
        place.copy_(wide if b is None else wide.add_(b))
    return out


def sum_of(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of the products a b, rounded once where they are made in float32."""
    (a, b), *rest = pairs
    wide = torch.float32 if _widens(a) else a.dtype
    total = torch.mm(a.to(wide), b.to(wide))
    for c, d in rest:
        total.addmm_(c.to(wide), d.to(wide))
    return total.to(a.dtype)


def weight(parts: list[Tensor], x: Tensor) -> Tensor:
    """Gradient of a weight whose rows make `parts` of x: [part^T x for each part]."""
    dw = x.new_empty(sum(part.shape[1] for part in parts), x.shape[1])
    for part, place in zip(parts, dw.chunk(len(parts)), strict=True):
        mm(part.t(), x, out=place)
    return dw


def bias(parts: list[Tensor], like: Tensor | None) -> Tensor:
    """Gradient of the bias beside that weight, empty without one."""
    return parts[0].new_empty(0) if like is None else torch.cat([part.sum(0) for part in parts])
