"""CogVLM's decoder layer in plain PyTorch, as published: boolean masks, a gather and a scatter for each expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def expert_masks(types: Tensor) -> tuple[Tensor, Tensor]:
    vision = torch.zeros_like(types, dtype=torch.bool)
    vision[:, :-1] = (types[:, :-1] == 1) & (types[:, 1:] == 1)
    return vision, ~vision


def positions(types: list[int], mask: list[int] | None = None) -> list[int]:
    """One row, token by token."""
    u = [-1 if mask is not None and not m else t for t, m in zip(types, mask or types, strict=True)]
    last = len(u) - 1
    w = list(u)
    for i, t in enumerate(u):
        if t == 1 and (i == 0 or u[i - 1] == 0 or i == last or u[i + 1] == 0):
            w[i] = 0
    found = [0]
    for i in range(1, len(u)):
        found.append(found[-1] + int(w[i] == 0 or (w[i] == 1 and w[i - 1] == 0)))
    return found


def training_positions(types: list[int], image_length: int) -> list[int]:
    """One row of the training code: a new number unless a patch follows a patch of its image."""
    found, pid, place, before = [], -1, 0, 0
    for t in types:
        place = place % (image_length + 2) + 1 if t else 0
        patch = int(1 < place < image_length + 2)
        pid += not patch or patch != before
        before = patch
        found.append(pid)
    return found


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


def choose(x: Tensor, vision: Tensor, of_vision: nn.Module, of_text: nn.Module, width: int) -> Tensor:
    y = x.new_empty(*x.shape[:-1], width)
    y[vision] = of_vision(x[vision])
    y[~vision] = of_text(x[~vision])
    return y


class Rotary(nn.Module):
    def __init__(self, width: int, base: float, in_model_dtype: bool) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, width, 2).float() / width))
        self.width, self.base, self.in_model_dtype = width, base, in_model_dtype

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        frequency = self.inv_freq
        if not self.in_model_dtype:
            wide = torch.promote_types(x.dtype, torch.float32)
            frequency = 1.0 / self.base ** (torch.arange(0, self.width, 2, dtype=wide) / self.width)
        angle = where.to(frequency.dtype)[..., None] * frequency
        angle = torch.cat([angle, angle], -1)[:, None]
        a, b = x.chunk(2, -1)
        return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * angle.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(
        self, width: int, heads: int, kv: int, *, bias: bool, base: float, in_model_dtype: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv, self.d = heads, kv, width // heads
        self.rows = width + 2 * kv * self.d
        self.vision_expert_query_key_value = nn.Linear(width, self.rows, bias=bias)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)
        self.language_expert_query_key_value = nn.Linear(width, self.rows, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)
        self.rotary_emb = Rotary(self.d, base, in_model_dtype)

    def forward(self, x: Tensor, types: Tensor, where: Tensor, key_mask: Tensor | None = None) -> Tensor:
        vision, _ = expert_masks(types)
        mixed = choose(
            x, vision, self.vision_expert_query_key_value, self.language_expert_query_key_value, self.rows
        )
        own = self.kv * self.d
        q, k, v = (
            t.unflatten(-1, (-1, self.d)).transpose(1, 2)
            for t in mixed.split((self.rows - 2 * own, own, own), -1)
        )
        q, k = self.rotary_emb(q, where), self.rotary_emb(k, where)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :].bool()
        scores = (q @ k.transpose(2, 3) * self.d**-0.5).masked_fill(~seen, torch.finfo(x.dtype).min)
        wide = torch.promote_types(x.dtype, torch.float32)
        o = scores.softmax(-1, dtype=wide).to(x.dtype) @ v
        o = o.transpose(1, 2).flatten(2)
        return choose(o, vision, self.vision_expert_dense, self.language_expert_dense, x.shape[-1])


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.language_mlp, self.vision_mlp = MLP(width, hidden), MLP(width, hidden)

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        vision, _ = expert_masks(types)
        return choose(x, vision, self.vision_mlp, self.language_mlp, x.shape[-1])


class Layer(nn.Module):
    def __init__(
        self, width: int, heads: int, kv: int, hidden: int, *, bias: bool = False, base: float = 1e4,
        in_model_dtype: bool = False, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.self_attn = Attention(width, heads, kv, bias=bias, base=base, in_model_dtype=in_model_dtype)
        self.mlp = ExpertMLP(width, hidden)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x: Tensor, types: Tensor, where: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), types, where, key_mask)
        return x + self.mlp(self.post_attention_layernorm(x), types)
