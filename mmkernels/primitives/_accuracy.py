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
    names = [n for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
    if not names:
        return {"out": out}
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = (out * weight.to(out)).sum()
    grads = torch.autograd.grad(loss, [inputs[n] for n in names], allow_unused=True)
    grown = {
        f"d{n}": torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, grads, strict=True)
    }
    return {"out": out.detach(), **grown}


def exact(room: Room, inputs: Inputs) -> Results:
    """The reference's results in float64; under "|dg|" how far the output moves with a leaf g of a single number."""
    wide = leaves(inputs, room, torch.float64)
    with using("reference"):
        found = results(room, wide, lambda: room.call(wide))
        for name in room.differentiable:
            if isinstance(wide.get(name), Tensor) and wide[name].numel() == 1:
                found[f"|d{name}|"] = _norm_of_derivative(room, wide, name)
    return found


def _norm_of_derivative(room: Room, wide: Inputs, name: str, h: float = 1e-4) -> Tensor:
    with torch.no_grad():
        outs = (room.call({**wide, name: wide[name] + side}) for side in (-h, h))
        low, high = (out if isinstance(out, Tensor) else out[0] for out in outs)
    return (high - low).norm() / (2 * h)


def eager(room: Room, inputs: Inputs) -> Results:
    fresh = leaves(inputs, room)
    return results(room, fresh, room.peers["eager"](fresh))


def worst_excess(ours: Results, plain: Results, truth: Results) -> tuple[float, str]:
    """The largest |error| / allowed error over all results, and whose it is: the rule holds up to 1.

    A gradient that is one number sums terms of either sign: it may vanish while its terms do not, and eager's error is a
    single draw that may be lucky. Its rounding step is taken of the terms' norm, eight times.
    """
    found = (0.0, "")
    for name, value in ours.items():
        exact = truth[name]
        error = (value.double() - exact).abs()
        if error.numel() == 0:
            continue
        size = 8 * truth[f"|{name}|"] if f"|{name}|" in truth else exact.abs().max()
        step = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        allowed = 2 * (plain[name].double() - exact).abs().max() + step * size + 1e-30
        excess = float((error.max() / allowed).nan_to_num(nan=torch.inf))
        found = max(found, (excess, name))
    return found
