"""Compares one of our modules with the authors' one: weights copied by `weights.load`, outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from mmkernels import weights

# float64 runs our references, so only arithmetic order differs; float32 runs whatever kernels this machine has
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


def _close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape, name
    worst = float((ours - theirs).detach().abs().max()) if ours.numel() else 0.0
    size = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    assert worst <= tolerance * (1 + size), f"{name}: off by {worst:.3g} where values reach {size:.3g}"


def _as_ours(module: nn.Module, source: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the authors' keys -> under our names, by the module's own table: joins and permutations are linear."""
    found = {}
    for name in module.state_dict():
        ways = [(r, keys) for r in module.published(source).rules if (keys := r.sources(name)) is not None]
        rule, keys = next(way for way in ways if all(key in state for key in way[1]))
        found[name] = rule.value([state[key] for key in keys])
    return found


@pytest.fixture
def agree() -> Callable[..., None]:
    """`agree(ours, theirs, source, run_ours, run_theirs, inputs)`; each run maps the inputs to one output tensor."""

    def check(
        ours: nn.Module,
        theirs: nn.Module,
        source: str,
        run_ours: Callable[..., Tensor],
        run_theirs: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        tolerance: float | None = None,
        rename: Callable[[str], str] = lambda key: key,
    ) -> None:
        tolerance = tolerance or TOLERANCE[next(ours.parameters()).dtype]
        generator = torch.Generator().manual_seed(5)
        for (
            parameter
        ) in theirs.parameters():  # published initial values are often zeros and ones, which hide mistakes
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        weights.load(ours, {rename(k): v for k, v in theirs.state_dict().items()}, source=source)
        ours_in, theirs_in = (
            [x.clone().requires_grad_(x.is_floating_point()) for x in inputs] for _ in range(2)
        )
        y, z = run_ours(*ours_in), run_theirs(*theirs_in)
        _close("output", y, z, tolerance)
        weight = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        (y * weight).sum().backward()
        (z * weight).sum().backward()
        for n, (a, b) in enumerate(zip(ours_in, theirs_in, strict=True)):
            if b.grad is not None:
                _close(f"gradient of input {n}", a.grad, b.grad, tolerance)
        gradients = {
            rename(k): torch.zeros_like(p) if p.grad is None else p.grad
            for k, p in theirs.named_parameters(remove_duplicate=False)
        }
        expected = _as_ours(ours, source, gradients)
        for name, parameter in ours.named_parameters():
            if parameter.numel():
                ours_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                _close(f"gradient of {name}", ours_grad, expected[name], tolerance)

    return check
