"""DeepSpeed's MoE as published (0.9.5: top 1 and top 2), token by token and slot by slot; experts under MoE-LLaVA's names."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = {
    "gelu_tanh": (("fc1",), "fc2"),
    "gelu": (("fc1",), "fc2"),
    "swiglu": (("gate_proj", "up_proj"), "down_proj"),
}


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str, names: tuple[tuple[str, ...], str]) -> None:
        super().__init__()
        self.activation, (self.ups, self.down) = activation, names
        bias = activation != "swiglu"
        for name in self.ups:
            self.add_module(name, nn.Linear(width, hidden, bias))
        self.add_module(self.down, nn.Linear(hidden, width, bias))

    def forward(self, x: Tensor) -> Tensor:
        ups = [self.get_submodule(name)(x) for name in self.ups]
        if self.activation == "swiglu":
            h = F.silu(ups[0]) * ups[1]
        else:
            h = F.gelu(ups[0], approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.get_submodule(self.down)(h)


class Experts(nn.Module):
    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)


class Gate(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, experts, bias=False)


class Inner(nn.Module):
    def __init__(self, width: int, experts: list[nn.Module]) -> None:
        super().__init__()
        self.gate, self.experts = Gate(width, len(experts)), Experts(experts)


class DeepSpeedMoE(nn.Module):
    """`forward(x [B, T, C], noise [S, E])` -> y and l_aux."""

    def __init__(
        self, width: int, hidden: int, experts: int, k: int, factor: float, activation: str, residual: bool
    ) -> None:
        super().__init__()
        made = [Expert(width, hidden, activation, NAMES[activation]) for _ in range(experts)]
        self.deepspeed_moe, self.k, self.factor = Inner(width, list(made)), k, factor
        if residual:
            self.mlp, self.coefficient = (
                Expert(width, hidden, activation, NAMES[activation]),
                nn.Linear(width, 2),
            )

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        logits = self.deepspeed_moe.gate.wg(flat)
        s, e = logits.shape
        p = logits.softmax(-1)
        capacity = math.ceil(float(torch.tensor(s / e) * torch.tensor(self.factor * self.k)))
        first = logits.argmax(-1)
        choices = [first]
        if self.k == 2:
            noisy = logits if noise is None else logits + noise
            choices.append(noisy.masked_fill(F.one_hot(first, e).bool(), -torch.inf).argmax(-1))
        filled = [0] * e
        kept = torch.zeros(s, self.k)
        for j, choice in enumerate(choices):
            for t in range(s):
                kept[t, j] = filled[int(choice[t])] < capacity
                filled[int(choice[t])] += 1
        g = torch.stack([p.gather(1, c[:, None])[:, 0] for c in choices], 1) * kept
        if self.k == 2:
            g = g / g.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        y = torch.zeros_like(flat)
        for j, choice in enumerate(choices):
            rows = [
                self.deepspeed_moe.experts.deepspeed_experts[int(n)](flat[t]) for t, n in enumerate(choice)
            ]
            y = y + g[:, j : j + 1] * torch.stack(rows)
        aux = (p.mean(0) * F.one_hot(first, e).to(p.dtype).mean(0)).sum() * e
        y = y.view(x.shape)
        if hasattr(self, "mlp"):
            c = self.coefficient(x).softmax(-1)
            y = y * c[..., :1] + self.mlp(x) * c[..., 1:]
        return y, aux


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state with some of its keys' words replaced."""
    out = {}
    for key, value in state.items():
        out[".".join(names.get(word, word) for word in key.split("."))] = value
    return out
