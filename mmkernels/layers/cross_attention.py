"""Rows that attend to all rows of a memory, and the transformer block around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.layers.attention import SelfAttention, Visibility
from mmkernels.layers.mlp import MLP
from mmkernels.primitives.interval_attention import interval_attention


def everything(rows: Tensor, keys: int) -> Visibility:
    """Every row of `[B, T, C]` sees all of `keys`."""
    lo = torch.zeros(rows.shape[:2], dtype=torch.int32, device=rows.device)
    return Visibility(lo, torch.full_like(lo, keys))


class CrossAttention(nn.Module):
    """Multi-head attention of rows to a memory of the same width; rows of `kv` are all keys', then all values'."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x `[B, T, C]`, memory `[B, M, C]` -> `[B, T, C]`."""
        seen = everything(x, memory.shape[1])
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.transpose(1, 2) for t in self.kv(memory).unflatten(-1, (2, self.heads, -1)).unbind(2))
        o = interval_attention(q, k, v, seen.lo, seen.hi)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[union-attr]


class CrossBlock(nn.Module):
    """`x += attention(norm(x)); x += cross(norm(x), memory); x += mlp(norm(x))`: a decoder layer without any mask."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.cross_norm, self.cross = nn.LayerNorm(width), CrossAttention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), MLP(width, hidden, activation)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x `[B, T, C]`, memory `[B, M, C]` -> `[B, T, C]`."""
        x = x + self.attention(self.attention_norm(x), everything(x, x.shape[1]))
        x = x + self.cross(self.cross_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))
