"""The accuracy rule: |ours - exact| <= 2 |eager in that dtype - exact| + one rounding step, for outputs and every gradient.

`exact` is the reference in float64. The tests and the benchmark's gate both ask here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._case import Inputs, Room
from mmkernels.primitives._op import using

Results = dict[str, Tensor]


def leaves(inputs: Inputs, room: Room, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs with fresh leaves for the differentiable ones; floating tensors in `dtype` when it is given."""
    fresh: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype)
            value = value.requires_grad_(name in room.differentiable)
        fresh[name] = value
    return fresh


def results(room: Room, inputs: Inputs, function: Callable[[], Any], seed: int = 7) -> Results:
    """The first output of `function` under "out", and the gradient of a fixed random projection of it by input name."""
    out = function()
    out = out if isinstance(out, Tensor) else out[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names = [n for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
    loss = (out * weight.to(out)).sum()
    grads = torch.autograd.grad(loss, [inputs[n] for n in names], allow_unused=True)
    grown = {
        f"d{n}": torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, grads, strict=True)
    }
    return {"out": out.detach(), **grown}


def exact(room: Room, inputs: Inputs) -> Results:
    wide = leaves(inputs, room, torch.float64)
    with using("reference"):
        return results(room, wide, lambda: room.call(wide))


def eager(room: Room, inputs: Inputs) -> Results:
    fresh = leaves(inputs, room)
    return results(room, fresh, room.peers["eager"](fresh))


def worst_excess(ours: Results, plain: Results, truth: Results) -> tuple[float, str]:
    """The largest |error| / allowed error over all results, and whose it is: the rule holds up to 1."""
    found = (0.0, "")
    for name, value in truth.items():
        error = (ours[name].double() - value).abs()
        if error.numel() == 0:
            continue
        step = torch.finfo(ours[name].dtype).eps * value.abs().max()
        allowed = 2 * (plain[name].double() - value).abs().max() + step + 1e-30
        excess = float((error.max() / allowed).nan_to_num(nan=torch.inf))
        found = max(found, (excess, name))
    return found
