"""The vision tower: a CLIP-style ViT over a plain grid of patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkernels.layers.attention import Visibility
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.primitives import _check


@dataclass(frozen=True)
class VisionConfig:
    """A ViT: square images, a class token, learned positions, a norm before the blocks; `post_norm` also norms what comes out."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    post_norm: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


CLIP_L = VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, hidden=4096)


class VisionTower(nn.Module):
    """Images to patch tokens: `norm([class; patches] + positions)`, then the blocks; the class token stays inside.

    Patches are not normed on the way out unless `config.post_norm`: connectors read the last block's output.
    **Source** CLIP (arXiv 2103.00020).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch = nn.Linear(3 * c.patch_size**2, c.width, bias=False)
        self.class_token = nn.Parameter(torch.randn(c.width) * c.width**-0.5)
        self.positions = nn.Parameter(torch.randn(c.patches + 1, c.width) * c.width**-0.5)
        self.pre_norm = nn.LayerNorm(c.width, c.eps)
        block = BlockConfig(c.width, c.heads, c.hidden, activation=c.activation, eps=c.eps)
        self.blocks = nn.ModuleList(Block(block) for _ in range(c.layers))
        self.post_norm = nn.LayerNorm(c.width, c.eps) if c.post_norm else None

    def forward(self, images: Tensor) -> Tensor:
        """images `[N, 3, S, S]`, normalised -> patch tokens `[N, P, C]`, row by row. **Raises** ValueError for other sizes."""
        s = self.config.image_size
        _check.shapes(images=(images, f"N 3 {s} {s}"))
        x = self.patch(_patchify(images, self.config.patch_size))
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1) + self.positions
        x = self.pre_norm(x)
        lo = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        seen = Visibility(lo, torch.full_like(lo, x.shape[1]))
        for block in self.blocks:
            x = block(x, seen)
        x = x[:, 1:]
        return x if self.post_norm is None else self.post_norm(x)


def _patchify(images: Tensor, size: int) -> Tensor:
    """`[N, 3, S, S]` -> `[N, P, 3 * size^2]`, channels outermost inside a patch, as a convolution's weight has them."""
    n, c, h, w = images.shape
    grid = images.view(n, c, h // size, size, w // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // size) * (w // size), c * size * size)
