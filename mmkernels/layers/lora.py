"""Low-rank updates of a decoder's projections: what is tuned while the projections themselves stay frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.decoder import Decoder
from mmkernels.layers.mlp import GATED
from mmkernels.primitives import _check

_TARGETS = ("q", "k", "v", "out", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """`targets` are projections of every block: "q", "k", "v" and "out" of the attention, "up" (of a gated one the gate too)
    and "down" of the feed-forward. `dropout` is that of the update's input while training.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v", "up", "down")

    def __post_init__(self) -> None:
        _check.positive(rank=self.rank, targets=len(self.targets))
        for target in self.targets:
            _check.choice("targets", target, _TARGETS)


class LoraLinear(nn.Linear):
    """`y = W x + b`, and `+ alpha / rank * B A dropout(x)` for those of its `parts`, runs of rows, that are `tuned`.

    A and B are the tuned parts' own: `lora_down` has the rows of their A, `lora_up` those of their B. B starts at 0.
    """

    def __init__(
        self, inputs: int, parts: tuple[int, ...], tuned: tuple[bool, ...], *, bias: bool, config: LoraConfig
    ) -> None:
        super().__init__(inputs, sum(parts), bias)
        self.parts, self.tuned, self.lora = parts, tuned, config
        rows = sum(part for part, own in zip(parts, tuned, strict=True) if own)
        self.lora_down = nn.Parameter(torch.empty(sum(tuned) * config.rank, inputs))
        self.lora_up = nn.Parameter(torch.zeros(rows, config.rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """input `[..., inputs]` -> `[..., sum(parts)]`."""
        downs = iter(self.lora_down.split(self.lora.rank))
        ups = iter(self.lora_up.split([p for p, own in zip(self.parts, self.tuned, strict=True) if own]))
        made = []
        for part, own in zip(super().forward(input).split(self.parts, -1), self.tuned, strict=True):
            if own:
                low = F.linear(F.dropout(input, self.lora.dropout, self.training), next(downs))
                part = part + F.linear(low, next(ups)) * (self.lora.alpha / self.lora.rank)
            made.append(part)
        return made[0] if len(made) == 1 else torch.cat(made, -1)


def add_lora(decoder: Decoder, config: LoraConfig) -> None:
    """Gives every block of a fresh decoder the updates that `config` names. **Raises** ValueError where a block has them."""
    has, b = frozenset(config.targets), decoder.config.block
    kv = (b.kv_heads or b.heads) * (b.head_dim or b.width // b.heads)
    up = (b.hidden, b.hidden) if b.activation in GATED else (b.hidden,)
    for block in decoder.blocks:
        attention: Any = block.attention
        mlp: Any = block.mlp
        places = (
            (attention, "qkv", (attention.out.in_features, kv, kv), tuple(t in has for t in "qkv")),
            (attention, "out", (b.width,), ("out" in has,)),
            (mlp, "up", up, ("up" in has,) * len(up)),
            (mlp, "down", (b.width,), ("down" in has,)),
        )
        for owner, name, parts, tuned in places:
            old = getattr(owner, name)
            if isinstance(old, LoraLinear):
                raise ValueError("decoder: got one whose blocks have LoRA already, expected one without")
            if any(tuned):
                bias = old.bias is not None
                setattr(owner, name, LoraLinear(old.in_features, parts, tuned, bias=bias, config=config))


def lora_table(config: LoraConfig) -> Table:
    """Where files laid out as "llama" keep the updates, beside the projections: `q_proj.lora_A.weight` and so on."""
    has = frozenset(config.targets)
    theirs = {
        r"attention\.qkv": [f"self_attn.{t}_proj" for t in "qkv" if t in has],
        r"attention\.out": ["self_attn.o_proj"],
        r"mlp\.up": ["mlp.gate_proj", "mlp.up_proj"],
        r"mlp\.down": ["mlp.down_proj"],
    }
    return Table(
        tuple(
            Rule(
                rf"blocks\.(\d+)\.{ours}\.lora_{end}",
                tuple(f"model.layers.{{0}}.{name}.lora_{letter}.weight" for name in names),
            )
            for ours, names in theirs.items()
            for end, letter in (("down", "A"), ("up", "B"))
        )
    )
