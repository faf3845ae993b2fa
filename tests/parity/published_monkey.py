"""Monkey's vision side with the authors' parameter names, in plain operations, one view at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from published_qwen import Resampler, stretched
from torch import Tensor, nn


class Lora(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.lora_scale = nn.Parameter(torch.ones(1))
        self.lora_a = nn.Linear(inputs, rank, bias=False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_scale * self.lora_b(self.lora_a(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, windows: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.in_proj_lora = nn.ModuleList(Lora(width, 3 * width, 16) for _ in range(windows))
        self.out_proj_lora = nn.ModuleList(Lora(width, width, 16) for _ in range(windows))

    def forward(self, x: Tensor, idx: int | None) -> Tensor:
        z = self.in_proj(x) if idx is None else self.in_proj(x) + self.in_proj_lora[idx](x)
        outs = []
        for head in z.chunk(self.heads, -1):
            q, k, v = head.chunk(3, -1)
            outs.append((q / q.shape[-1] ** 0.5 @ k.mT).softmax(-1) @ v)
        c = torch.cat(outs, -1)
        return self.out_proj(c) if idx is None else self.out_proj(c) + self.out_proj_lora[idx](c)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, windows: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, windows)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})
        self.mlp_lora = nn.ModuleList(Lora(width, width, 32) for _ in range(windows))

    def forward(self, x: Tensor, idx: int | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), idx)
        y = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return y if idx is None else y + self.mlp_lora[idx](x)


class Visual(nn.Module):
    """Windows of `window` pixels and the whole picture, as `[B, (W + 1) grid^2, out]`."""

    def __init__(
        self, patch: int, width: int, layers: int, heads: int, hidden: int, out: int, out_heads: int, grid: int,
        window: int, windows: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.window = window
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(out, eps=1e-6)
        blocks = nn.ModuleList(Block(width, heads, hidden, windows) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.attn_pool = Resampler(grid, out, out_heads, width)
        self.proj = nn.Parameter(torch.randn(out, out))

    def view(self, x: Tensor, idx: int | None) -> Tensor:
        x = self.conv1(x)
        h, w = x.shape[-2:]
        x = x.flatten(2).mT + stretched(self.positional_embedding, h, w)
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x, idx)
        return self.ln_post(self.attn_pool(x, (h, w))) @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        s, (height, width) = self.window, images.shape[-2:]
        outs = []
        for i in range((height - s) // s + 1):
            for j in range((width - s) // s + 1):
                cut = images[:, :, i * s : i * s + s, j * s : j * s + s]
                outs.append(self.view(cut, len(outs)))
        outs.append(self.view(F.interpolate(images, size=(s, s), mode="bicubic"), None))
        return torch.cat(outs, 1)
