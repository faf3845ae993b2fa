"""The vision tower: a CLIP-style ViT over a plain grid of patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.attention import Visibility
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.layers.eva_table import EVA
from mmkernels.primitives import _check


@dataclass(frozen=True)
class VisionConfig:
    """A ViT over square images: class token, learned positions, a norm before the blocks.

    `post_norm` also norms the patches that come out. EVA has no `pre_norm`, a `patch_bias`, and hands on its class token
    (`keep_class`).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    post_norm: bool = False
    pre_norm: bool = True
    patch_bias: bool = False
    keep_class: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


CLIP_L = VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, hidden=4096)
EVA_G = VisionConfig(
    image_size=224, patch_size=14, width=1408, layers=39, heads=16, hidden=6144, activation="gelu", eps=1e-6,
    pre_norm=False, patch_bias=True, keep_class=True,
)  # fmt: skip


class VisionTower(nn.Module):
    """Images to patch tokens: `norm([class; patches] + positions)`, then the blocks; the class token stays inside.

    Patches are not normed on the way out unless `config.post_norm`: connectors read the last block's output.
    **Source** CLIP (arXiv 2103.00020), EVA-CLIP (arXiv 2303.15389); weights of `huggingface_clip`, `open_clip` and `eva` load
    by `weights.load`.
    """

    sources = ("huggingface_clip", "open_clip", "eva")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch = nn.Linear(3 * c.patch_size**2, c.width, bias=c.patch_bias)
        self.class_token = nn.Parameter(torch.randn(c.width) * c.width**-0.5)
        self.positions = nn.Parameter(torch.randn(c.patches + 1, c.width) * c.width**-0.5)
        self.pre_norm = nn.LayerNorm(c.width, c.eps) if c.pre_norm else None
        block = BlockConfig(c.width, c.heads, c.hidden, activation=c.activation, eps=c.eps)
        self.blocks = nn.ModuleList(Block(block) for _ in range(c.layers))
        self.post_norm = nn.LayerNorm(c.width, c.eps) if c.post_norm else None

    def forward(self, images: Tensor) -> Tensor:
        """images `[N, 3, S, S]`, normalised -> patch tokens `[N, P, C]`, row by row, behind the class token if it is kept.

        **Raises** ValueError for other sizes.
        """
        s = self.config.image_size
        _check.shapes(images=(images, f"N 3 {s} {s}"))
        x = self.patch(_patchify(images.to(self.patch.weight.dtype), self.config.patch_size))
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1) + self.positions
        x = x if self.pre_norm is None else self.pre_norm(x)
        lo = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        seen = Visibility(lo, torch.full_like(lo, x.shape[1]))
        for block in self.blocks:
            x = block(x, seen)
        x = x if self.config.keep_class else x[:, 1:]
        return x if self.post_norm is None else self.post_norm(x)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the tower's parameters."""
        return {"huggingface_clip": _HUGGINGFACE, "open_clip": _OPEN_CLIP, "eva": EVA}[source]


def _patchify(images: Tensor, size: int) -> Tensor:
    """`[N, 3, S, S]` -> `[N, P, 3 * size^2]`, channels outermost inside a patch, as a convolution's weight has them."""
    n, c, h, w = images.shape
    grid = images.view(n, c, h // size, size, w // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // size) * (w // size), c * size * size)


def _table(
    top: dict[str, str], blocks: str, inside: dict[str, str], qkv: tuple[str, ...], within: str, unused: str
) -> Table:
    """A CLIP layout: `top` and `inside` (a block under `blocks`) map our names to theirs; keys like `unused` are skipped."""
    patch = Rule(r"patch\.weight", (f"{top['patch']}.weight",), lambda t: t.flatten(1))
    whole = [Rule(ours, (top[ours],)) for ours in ("class_token", "positions")]
    norms = [Rule(rf"{ours}\.(\w+)", (f"{top[ours]}.{{0}}",)) for ours in ("pre_norm", "post_norm")]
    joined = Rule(
        r"blocks\.(\d+)\.attention\.qkv\.(\w+)", tuple(f"{blocks}.{{0}}.{name}{{1}}" for name in qkv)
    )
    rest = [
        Rule(rf"blocks\.(\d+)\.{ours}\.(\w+)", (f"{blocks}.{{0}}.{name}.{{1}}",))
        for ours, name in inside.items()
    ]
    ignored = (rf"{top['post_norm']}\..*", unused)  # the norm that only a pooled class token goes through
    return Table((patch, *whole, *norms, joined, *rest), ignored=ignored, within=within)


_HUGGINGFACE = _table(
    {
        "patch": "embeddings.patch_embedding", "class_token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm", "post_norm": "post_layernorm",
    },
    "encoder.layers",
    {
        "attention_norm": "layer_norm1", r"attention\.out": "self_attn.out_proj", "mlp_norm": "layer_norm2",
        r"mlp\.up": "mlp.fc1", r"mlp\.down": "mlp.fc2",
    },
    ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    within="vision_model.",
    unused=r"embeddings\.position_ids",
)  # fmt: skip
_OPEN_CLIP = _table(
    {
        "patch": "conv1", "class_token": "class_embedding", "positions": "positional_embedding", "pre_norm": "ln_pre",
        "post_norm": "ln_post",
    },
    "transformer.resblocks",
    {
        "attention_norm": "ln_1", r"attention\.out": "attn.out_proj", "mlp_norm": "ln_2", r"mlp\.up": "mlp.c_fc",
        r"mlp\.down": "mlp.c_proj",
    },
    ("attn.in_proj_",),
    within="visual.",
    unused="proj",
)  # fmt: skip
