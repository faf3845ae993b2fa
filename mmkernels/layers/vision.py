"""The vision tower: a CLIP-style ViT over a plain grid of patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.attention import Visibility
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.layers.decoder_tables import heads_last
from mmkernels.layers.eva_table import eva_e_table, eva_table
from mmkernels.layers.modality_adapter import AdapterConfig, adapters_table
from mmkernels.layers.positions import interpolate_positions
from mmkernels.primitives import _check


@dataclass(frozen=True)
class VisionConfig:
    """A ViT over square images: class token, learned positions, a norm before the blocks.

    `post_norm` also norms the patches that come out. `class_token=False` leaves it out. With `any_size` images may have other
    sizes, whole patches each way: the positions are stretched to them. EVA has no `pre_norm`, a `patch_bias`, and hands on its
    class token (`keep_class`). LaVIN has an `adapter` in every block and takes the class token alone, after every
    `class_every` blocks. `norm_after` is `BlockConfig`'s. `select_layer` says which hidden state comes out: 0 is what
    enters the first block, -1 what leaves the last one; blocks behind it are kept as published and never run.
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

    @property
    def depth(self) -> int:
        """Blocks that run."""
        return self.select_layer + (self.layers + 1 if self.select_layer < 0 else 0)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


CLIP_L = VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, hidden=4096)
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


class VisionTower(nn.Module):
    """Images to patch tokens: `norm([class; patches] + positions)`, then the blocks; the class token stays inside.

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
            c.width,
            c.heads,
            c.hidden,
            activation=c.activation,
            eps=c.eps,
            norm_after=c.norm_after,
            adapter=c.adapter,
        )
        self.blocks = nn.ModuleList(Block(block) for _ in range(c.layers))
        self.post_norm = nn.LayerNorm(c.width, c.eps) if c.post_norm else None

    def forward(self, images: Tensor) -> Tensor:
        """images `[N, 3, S, S]`, normalised -> patch tokens `[N, P, C]`, row by row, behind the class token if it is kept.

        With `class_every` -> the class tokens `[N, layers / class_every, C]`.
        **Raises** ValueError for other sizes.
        """
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
            return _qwen_vl(self.config.heads)
        if source == "lavin":
            adapters = adapters_table(self.blocks, source, "transformer.resblocks")
            return replace(_OPEN_CLIP + adapters, within="backbone.visual.")
        if source == "eva":
            return (eva_e_table if self.config.norm_after else eva_table)(self.config.patches)
        return {"huggingface_clip": _HUGGINGFACE, "open_clip": _OPEN_CLIP}[source]


def _patchify(images: Tensor, size: int) -> Tensor:
    """`[N, 3, S, S]` -> `[N, P, 3 * size^2]`, channels outermost inside a patch, as a convolution's weight has them."""
    n, c, h, w = images.shape
    grid = images.view(n, c, h // size, size, w // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // size) * (w // size), c * size * size)


def _table(
    top: dict[str, str],
    blocks: str,
    inside: dict[str, str],
    qkv: tuple[str, ...],
    within: str,
    unused: tuple[str, ...],
    view: Callable[[Tensor], Tensor] | None = None,
) -> Table:
    """A CLIP layout: `top` and `inside` (a block under `blocks`) map our names to theirs; keys like `unused` are skipped.

    `view` brings the joined rows of queries, keys and values into our order.
    """
    patch = Rule(r"patch\.weight", (f"{top['patch']}.weight",), lambda t: t.flatten(1))
    whole = [Rule(ours, (top[ours],)) for ours in ("class_token", "positions") if ours in top]
    norms = [
        Rule(rf"{ours}\.(\w+)", (f"{top[ours]}.{{0}}",)) for ours in ("pre_norm", "post_norm") if ours in top
    ]
    joined = Rule(
        r"blocks\.(\d+)\.attention\.qkv\.(\w+)", tuple(f"{blocks}.{{0}}.{name}{{1}}" for name in qkv), view
    )
    rest = [
        Rule(rf"blocks\.(\d+)\.{ours}\.(\w+)", (f"{blocks}.{{0}}.{name}.{{1}}",))
        for ours, name in inside.items()
    ]
    return Table((patch, *whole, *norms, joined, *rest), ignored=unused, within=within)


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
    unused=(r"post_layernorm\..*", r"embeddings\.position_ids"),
)  # fmt: skip
_RESBLOCK = {
    "attention_norm": "ln_1", r"attention\.out": "attn.out_proj", "mlp_norm": "ln_2", r"mlp\.up": "mlp.c_fc",
    r"mlp\.down": "mlp.c_proj",
}  # fmt: skip
_OPEN_CLIP = _table(
    {
        "patch": "conv1", "class_token": "class_embedding", "positions": "positional_embedding", "pre_norm": "ln_pre",
        "post_norm": "ln_post",
    },
    "transformer.resblocks",
    _RESBLOCK,
    ("attn.in_proj_",),
    within="visual.",
    unused=(r"ln_post\..*", "proj"),
)  # fmt: skip


def _qwen_vl(heads: int) -> Table:
    """Qwen-VL's file: the rows of a block's `in_proj` are q, k, v of each head; resampler, norm and projection lie beside."""
    return _table(
        {"patch": "conv1", "positions": "positional_embedding", "pre_norm": "ln_pre"},
        "transformer.resblocks",
        _RESBLOCK,
        ("attn.in_proj.",),
        within="transformer.visual.",
        unused=(r"attn_pool\..*", r"ln_post\..*", "proj"),
        view=lambda rows: heads_last(rows, heads),
    )
