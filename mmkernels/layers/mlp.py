"""The feed-forward of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.primitives import _check


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}
GATED = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": ACTIVATIONS["gelu_tanh"]}


class MLP(nn.Module):
    """`down(act(up x))`; for the gated kinds the rows of `up` are [gate; up] and the middle is `act(gate) * up`."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        _check.choice("activation", activation, (*ACTIVATIONS, *GATED))
        self.activation = activation
        self.up = nn.Linear(width, hidden * (2 if activation in GATED else 1), bias)
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.activation in GATED:
            gate, up = h.chunk(2, dim=-1)
            return self.down(GATED[self.activation](gate) * up)
        return self.down(ACTIVATIONS[self.activation](h))
