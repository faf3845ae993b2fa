"""The vision tower: a CLIP-style ViT over images of one size, or over packed slices of any size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.attention import Packed, Visibility
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.layers.eva_table import eva_e_table, eva_table
from mmkernels.layers.modality_adapter import AdapterConfig, adapters_table
from mmkernels.layers.positions import interpolate_positions
from mmkernels.layers.vision_tables import HUGGINGFACE, OPEN_CLIP, qwen_vl_table
from mmkernels.ops.sliced_image import slice_offsets, slice_patch_embed
from mmkernels.primitives import _check


@dataclass(frozen=True)
class VisionConfig:
    """A ViT over square images: class token, learned positions, a norm before the blocks.

    `post_norm` also norms the patches that come out. `class_token=False` leaves it out. With `any_size` images may have other
    sizes, whole patches each way: the positions are stretched to them. EVA has no `pre_norm`, a `patch_bias`, and hands on its
    class token (`keep_class`). LaVIN has an `adapter` in every block and takes the class token alone, after every
    `class_every` blocks. `norm_after` is `BlockConfig`'s. `select_layer` says which hidden state comes out: 0 is what
    enters the first block, -1 what leaves the last one; blocks behind it are kept as published and never run.
    Training drops a block's sums with a probability that rises from 0 at the first block to `drop_path` at the last.
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
    class_token: bool = True
    any_size: bool = False
    pre_norm: bool = True
    patch_bias: bool = False
    keep_class: bool = False
    adapter: AdapterConfig | None = None
    class_every: int | None = None
    norm_after: bool = False
    select_layer: int = -1
    drop_path: float = 0.0

    @property
    def depth(self) -> int:
        """Blocks that run."""
        return self.select_layer + (self.layers + 1 if self.select_layer < 0 else 0)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


CLIP_L = VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, hidden=4096)
CLIP_L_336 = replace(CLIP_L, image_size=336)
OPEN_CLIP_BIGG = VisionConfig(
    image_size=224, patch_size=14, width=1664, layers=48, heads=16, hidden=8192, activation="gelu"
)  # fmt: skip
VIT_BIGG = VisionConfig(
    image_size=224, patch_size=14, width=1664, layers=48, heads=16, hidden=8192, activation="gelu", eps=1e-6,
    class_token=False, any_size=True,
)  # fmt: skip
EVA_G = VisionConfig(
    image_size=224, patch_size=14, width=1408, layers=39, heads=16, hidden=6144, activation="gelu", eps=1e-6,
    pre_norm=False, patch_bias=True, keep_class=True,
)  # fmt: skip

EVA_E = VisionConfig(  # its last layer, the 64th, is dropped
    image_size=224, patch_size=14, width=1792, layers=63, heads=16, hidden=15_360, activation="gelu", eps=1e-6,
    pre_norm=False, patch_bias=True, keep_class=True, norm_after=True,
)  # fmt: skip
SIGLIP_B = VisionConfig(
    image_size=224, patch_size=16, width=768, layers=12, heads=12, hidden=3072, activation="gelu_tanh", eps=1e-6,
    class_token=False, pre_norm=False, patch_bias=True, post_norm=True,
)  # fmt: skip
SIGLIP_L = replace(SIGLIP_B, image_size=256, width=1024, layers=24, heads=16, hidden=4096)
SIGLIP_SO400M = replace(SIGLIP_B, patch_size=14, width=1152, layers=27, heads=16, hidden=4304)
SIGLIP_SO400M_384 = replace(
    SIGLIP_SO400M, image_size=384
)  # 27 patches a side: what is left of the picture is not read


class VisionTower(nn.Module):
    """Images to patch tokens: `norm([class; patches] + positions)`, then the blocks; the class token stays inside.

    Images are a batch of one size, or packed patches of slices of any size: each slice attends to itself, its positions are
    stretched to its grid.

    Patches are not normed on the way out unless `config.post_norm`: connectors read the last block's output.
    **Source** CLIP (arXiv 2103.00020), EVA-CLIP (arXiv 2303.15389); weights of `huggingface_clip`, `open_clip`, `eva` and
    `qwen_vl` and `lavin` load by `weights.load`.
    """

    sources = ("huggingface_clip", "open_clip", "eva", "qwen_vl", "lavin")

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = self.config = config
        if not 0 <= c.depth <= c.layers:
            raise ValueError(f"select_layer: got {c.select_layer}, expected {-c.layers - 1} to {c.layers}")
        self.patch = nn.Linear(3 * c.patch_size**2, c.width, bias=c.patch_bias)
        self.class_token = nn.Parameter(torch.randn(c.width) * c.width**-0.5) if c.class_token else None
        self.positions = nn.Parameter(torch.randn(c.patches + c.class_token, c.width) * c.width**-0.5)
        self.pre_norm = nn.LayerNorm(c.width, c.eps) if c.pre_norm else None
        block = BlockConfig(
            c.width, c.heads, c.hidden, activation=c.activation, eps=c.eps, norm_after=c.norm_after, adapter=c.adapter
        )  # fmt: skip
        rates = (c.drop_path * n / max(c.layers - 1, 1) for n in range(c.layers))
        self.blocks = nn.ModuleList(Block(replace(block, drop_path=rate)) for rate in rates)
        self.post_norm = nn.LayerNorm(c.width, c.eps) if c.post_norm else None

    def forward(self, images: Tensor, slice_hw: Tensor | None = None) -> Tensor:
        """Pictures -> patch tokens, row by row, behind the class token if it is kept.

        **Shapes** images `[N, 3, S, S]`, normalised -> `[N, P, C]`; with `class_every` -> class tokens
        `[N, layers / class_every, C]`. Or packed: patches `[P, 3 patch_size^2]`, slice after slice, each row by row, channels
        outermost inside a patch, and their slice_hw int64 `[S, 2]`, (height, width) in patches -> `[P, C]`, or `[P + S, C]`
        where the class token is kept. **Edge** a slice's tokens do not depend on its neighbours; one compiled tower serves
        every mix of two slices or more (an empty one, `(0, 0)`, may stand beside a lone one). **Raises** ValueError for sizes.
        """
        if slice_hw is not None:
            return self._packed(images, slice_hw)
        positions = self._positions(images)
        x = self.patch(_patchify(images.to(self.patch.weight.dtype), self.config.patch_size))
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + positions
        x = x if self.pre_norm is None else self.pre_norm(x)
        lo = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        seen = Visibility(lo, torch.full_like(lo, x.shape[1]))
        classes = []
        for n, block in enumerate(self.blocks[: self.config.depth], start=1):
            x = block(x, seen)
            if self.config.class_every is not None and n % self.config.class_every == 0:
                classes.append(x[:, 0])
        if classes:
            return torch.stack(classes, dim=1)
        x = x if self.class_token is None or self.config.keep_class else x[:, 1:]
        return x if self.post_norm is None else self.post_norm(x)

    def _packed(self, patches: Tensor, slice_hw: Tensor) -> Tensor:
        c = self.config
        if c.adapter is not None or c.class_every is not None:
            raise ValueError(
                "slice_hw: got packed slices, expected images: adapters and class_every read whole images"
            )
        _check.shapes(patches=(patches, f"P {self.patch.in_features}"), slice_hw=(slice_hw, "S 2"))
        first = int(c.class_token)
        prefix = None if self.class_token is None else (self.class_token + self.positions[0]).unsqueeze(0)
        x = slice_patch_embed(
            patches.to(self.patch.weight.dtype), self.patch.weight, slice_hw, bias=self.patch.bias,
            positions=self.positions[first:], prefix=prefix,
        )  # fmt: skip
        x = x if self.pre_norm is None else self.pre_norm(x)
        offsets = slice_offsets(slice_hw, first)
        row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
        packed = Packed(offsets, torch.searchsorted(offsets[1:], row, right=True))
        seen, x = Visibility(row, row, packed=packed), x.unsqueeze(0)
        for block in self.blocks[: c.depth]:
            x = block(x, seen)
        x = x.squeeze(0)
        if first and not c.keep_class:
            ends = (slice_hw[:, 0] * slice_hw[:, 1]).cumsum(0)
            patch = torch.arange(patches.shape[0], device=x.device)
            x = x[patch + torch.searchsorted(ends, patch, right=True) + 1]
        return x if self.post_norm is None else self.post_norm(x)

    def _positions(self, images: Tensor) -> Tensor:
        """The position of every token, for images whose size is checked."""
        c = self.config
        if not c.any_size:
            _check.shapes(images=(images, f"N 3 {c.image_size} {c.image_size}"))
            return self.positions
        size = _check.shapes(images=(images, "N 3 H W"))
        grid = (size["H"] // c.patch_size, size["W"] // c.patch_size)
        if 0 in grid or size["H"] % c.patch_size or size["W"] % c.patch_size:
            raise ValueError(
                f"images: got {size['H']} x {size['W']} pixels, expected whole patches of {c.patch_size}"
            )
        cells = interpolate_positions(self.positions[int(c.class_token) :], grid)
        return torch.cat([self.positions[:1], cells]) if c.class_token else cells

    def resize(self, image_size: int) -> VisionTower:
        """Makes the tower one of images of another side, in place: its positions are stretched, once; finetuning goes on there.

        **Raises** ValueError for sides that are not whole patches.
        """
        c, side = self.config, image_size // self.config.patch_size
        if image_size < 1 or image_size % c.patch_size:
            raise ValueError(
                f"image_size: got {image_size}, expected a multiple of patch_size = {c.patch_size}"
            )
        with torch.no_grad():
            cells = interpolate_positions(self.positions[int(c.class_token) :], (side, side))
            table = torch.cat([self.positions[: int(c.class_token)], cells])
        self.positions = nn.Parameter(table.clone(), requires_grad=self.positions.requires_grad)
        self.config = replace(c, image_size=image_size)
        return self

    def published(self, source: str) -> Table:
        """Where the authors' files keep the tower's parameters; EVA's positions are stretched to the tower's images."""
        if source == "qwen_vl":
            return qwen_vl_table(self.config.heads)
        if source == "lavin":
            adapters = adapters_table(self.blocks, source, "transformer.resblocks")
            return replace(OPEN_CLIP + adapters, within="backbone.visual.")
        if source == "eva":
            return (eva_e_table if self.config.norm_after else eva_table)(self.config.patches)
        return {"huggingface_clip": HUGGINGFACE, "open_clip": OPEN_CLIP}[source]


def _patchify(images: Tensor, size: int) -> Tensor:
    """`[N, 3, S, S]` -> `[N, P, 3 * size^2]`, channels outermost inside a patch, as a convolution's weight has them."""
    n, c, h, w = images.shape
    images = images[
        :, :, : h // size * size, : w // size * size
    ]  # as a convolution leaves out what is no whole patch
    grid = images.reshape(n, c, h // size, size, w // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // size) * (w // size), c * size * size)
