"""Qwen-VL's vision side with the authors' parameter names, in plain operations and as plainly as the paper says it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stretched(table: Tensor, height: int, width: int) -> Tensor:
    side = math.isqrt(len(table))
    if (height, width) == (side, side):
        return table
    cells = table.float().reshape(side, side, -1).movedim(-1, 0)[None]
    out = F.interpolate(cells, size=(height, width), mode="bicubic", align_corners=False)
    return out[0].movedim(0, -1).reshape(height * width, -1).to(table.dtype)


class Attention(nn.Module):
    """The parameters of torch's MultiheadAttention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width))
        self.out_proj = nn.Linear(width, width)


class Resampler(nn.Module):
    def __init__(self, grid: int, width: int, heads: int, media_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(grid * grid, width))
        self.pos_embed = nn.Parameter(torch.randn(grid * grid, width), requires_grad=False)
        self.kv_proj = nn.Identity() if media_width == width else nn.Linear(media_width, width, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, blocked: Tensor | None = None
    ) -> Tensor:
        n, m, _ = x.shape
        height, width = grid or (math.isqrt(m), math.isqrt(m))
        c = self.ln_kv(self.kv_proj(x))
        wq, wk, wv = self.attn.in_proj_weight.chunk(3)
        bq, bk, bv = self.attn.in_proj_bias.chunk(3)
        q = (self.ln_q(self.query) + self.pos_embed) @ wq.T + bq
        k = (c + stretched(self.pos_embed, height, width)) @ wk.T + bk
        v = c @ wv.T + bv
        outs = []
        for qh, kh, vh in zip(*(t.chunk(self.heads, -1) for t in (q.expand(n, -1, -1), k, v)), strict=True):
            scores = qh @ kh.mT / math.sqrt(qh.shape[-1])
            if blocked is not None:
                scores = scores.masked_fill(blocked, -math.inf)
            outs.append(scores.softmax(-1) @ vh)
        return self.attn.out_proj(torch.cat(outs, -1))


class VisualAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for head in self.in_proj(x).chunk(self.heads, -1):
            q, k, v = head.chunk(3, -1)
            outs.append((q / math.sqrt(q.shape[-1]) @ k.mT).softmax(-1) @ v)
        return self.out_proj(torch.cat(outs, -1))


class ResidualBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = VisualAttention(width, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Visual(nn.Module):
    """`transformer.visual` of a Qwen-VL file; `cells` rows of positions whatever the images' size."""

    def __init__(
        self,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        out: int,
        out_heads: int,
        grid: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(ResidualBlock(width, heads, hidden) for _ in range(layers))}
        )
        self.attn_pool = Resampler(grid, out, out_heads, width)
        self.ln_post = nn.LayerNorm(out, eps=1e-6)
        self.proj = nn.Parameter(torch.randn(out, out) * out**-0.5)

    def tower(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        x = x.flatten(2).mT + stretched(self.positional_embedding, *x.shape[2:])
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:  # type: ignore[attr-defined]
            x = block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.ln_post(self.attn_pool(self.tower(images))) @ self.proj
