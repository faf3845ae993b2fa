"""CogVLM's vision side in plain PyTorch, with the published module names: EVA2-CLIP-E and the gated adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_embedding = nn.Parameter(torch.randn(1, width))
        self.position_embedding = nn.Embedding((size // patch) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], 1)
        return x + self.position_embedding.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.query_key_value, self.dense = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.query_key_value(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)) * (c // self.heads) ** -0.5
        return self.dense((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.input_layernorm = nn.LayerNorm(width, 1e-6)
        self.post_attention_layernorm = nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.input_layernorm(self.attention(x))
        return x + self.post_attention_layernorm(self.mlp.fc2(F.gelu(self.mlp.fc1(x))))


class GLU(nn.Module):
    def __init__(self, media: int, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(media, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.dense_h_to_4h = nn.Linear(width, hidden, bias=False)
        self.dense_4h_to_h = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = F.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(z)) * self.dense_h_to_4h(z))


class Vision(nn.Module):
    """`model.vision` of the released files."""

    def __init__(
        self, *, size: int, patch: int, width: int, heads: int, hidden: int, layers: int, out: int, inner: int, conv: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embedding, self.transformer = PatchEmbedding(size, patch, width), nn.Module()
        self.transformer.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.linear_proj = GLU(width, out, inner)
        if conv:
            self.conv = nn.Conv2d(width, width, 2, 2)
        self.boi, self.eoi = (nn.Parameter(torch.randn(1, 1, out)) for _ in range(2))
        for p in self.parameters():  # norms and biases that are not one and zero show where they are
            nn.init.normal_(p, std=0.3)

    def tower(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images)
        for layer in self.transformer.layers:
            x = layer(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        x = self.tower(images)[:, 1:]
        if hasattr(self, "conv"):
            side = int(x.shape[1] ** 0.5)
            x = x.transpose(1, 2).reshape(len(x), -1, side, side)
            x = self.conv(x).flatten(2).transpose(1, 2)
        x = self.linear_proj(x)
        n = len(x)
        return torch.cat([self.boi.expand(n, -1, -1), x, self.eoi.expand(n, -1, -1)], 1)
