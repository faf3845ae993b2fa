"""Monkey: Qwen-VL that reads a picture in windows and as a whole, with a low-rank update of its ViT for each window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.monkey_block import MonkeyBlock, blocks_table
from mmkernels.layers.positions import interpolate_positions
from mmkernels.layers.qwen_resampler import QwenResampler
from mmkernels.models.base import Tokens
from mmkernels.models.places import Expanded, expand_images
from mmkernels.models.qwen_text import Marks
from mmkernels.models.qwen_vl import QwenVL
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check


@dataclass(frozen=True)
class VisionConfig:
    """Monkey's vision side: pictures of `canvas` (height, width) in square windows of side `window`, patches of side `patch`.

    `cells` is the side of the stored grid of positions; the resampler has `grid^2` queries of the language model's width.
    """

    canvas: tuple[int, int] = (896, 896)
    window: int = 448
    patch: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    hidden: int = 8192
    cells: int = 16
    grid: int = 16
    lm_width: int = 4096
    lm_heads: int = 32
    eps: float = 1e-6
    dropout: float = 0.05

    @property
    def windows(self) -> int:
        """How many windows the canvas has; what is left over on the right and below is not read."""
        rows, columns = (side // self.window for side in self.canvas)
        return rows * columns

    @property
    def slots(self) -> int:
        """Tokens of a picture: those of every window and of the whole."""
        return (self.windows + 1) * self.grid**2

    @property
    def image_size(self) -> int:
        """The height of the canvas."""
        return self.canvas[0]


@dataclass(frozen=True)
class MonkeyConfig:
    """A whole Monkey; `stages` are its training recipe, of which the last says what a freshly built model trains."""

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    marks: Marks
    stages: tuple[Stage, ...]

    @property
    def slots(self) -> int:
        return self.vision.slots

    @property
    def look(self) -> dict[str, Any]:
        """How pictures are cut: arguments of `data.looks.look`."""
        v = self.vision
        options = {
            "canvas": (v.canvas[1], v.canvas[0]), "window": v.window, "patch": v.patch, "tokens_per_view": v.grid**2
        }  # fmt: skip
        return {"rule": "monkey", "options": options}


def global_view(images: Tensor, size: int = 448) -> Tensor:
    """The whole of normalised pictures `[N, 3, H, W]` at `size x size`: bicubic, no antialiasing, aspect ignored."""
    _check.shapes(images=(images, "N 3 H W"))
    _check.positive(size=size)
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)


def windows(images: Tensor, size: int = 448) -> Tensor:
    """The windows of pictures `[N, 3, H, W]`, row by row: `[N, W, 3, size, size]`. **Raises** ValueError where none fits."""
    sides = _check.shapes(images=(images, "N 3 H W"))
    rows, columns = sides["H"] // size, sides["W"] // size
    if not rows or not columns:
        raise ValueError(
            f"images: got {sides['H']} x {sides['W']} pixels, expected at least one window of {size} x {size}"
        )
    cut = (
        images[..., : rows * size, : columns * size]
        .unflatten(-1, (columns, size))
        .unflatten(-3, (rows, size))
    )
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class MonkeyVision(nn.Module):
    """Pictures to language-model tokens: `LN(resampler(vit(view))) proj` of every window, with its updates, and of the whole.

    **Source** Monkey (arXiv 2311.06607); `transformer.visual` of its files loads by `weights.load` as `monkey`.
    """

    sources = ("monkey",)

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = self.config = config
        if not c.windows or c.window % c.patch:
            raise ValueError(
                f"window: got {c.window} for a canvas of {c.canvas} and patches of {c.patch}, expected whole patches and a "
                "window that fits"
            )
        self.patch = nn.Linear(3 * c.patch**2, c.width, bias=False)
        self.positions = nn.Parameter(torch.randn(c.cells**2, c.width) * c.width**-0.5)
        self.pre_norm = nn.LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(
            MonkeyBlock(c.width, c.heads, c.hidden, c.windows, eps=c.eps, dropout=c.dropout)
            for _ in range(c.layers)
        )
        self.resampler = QwenResampler(c.grid, c.lm_width, c.lm_heads, c.width)
        self.post_norm = nn.LayerNorm(c.lm_width, c.eps)
        self.proj = nn.Parameter(torch.randn(c.lm_width, c.lm_width) * c.lm_width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """images `[N, 3, H, W]`, normalised -> `[N, (W + 1) grid^2, lm_width]`: window by window, the whole last.

        All views are one batch. **Raises** ValueError for shapes and for more windows than there are updates.
        """
        c, images = self.config, images.to(self.patch.weight.dtype)
        cut = windows(images, c.window)
        n, count = cut.shape[:2]
        if count > c.windows:
            raise ValueError(f"images: got {count} windows, expected at most {c.windows}")
        views = torch.cat([cut, global_view(images, c.window).unsqueeze(1)], 1)
        index = torch.arange(count + 1, device=images.device)
        window = torch.where(index < count, index, -1).repeat(n)
        return self.encode(views.flatten(0, 1), window).unflatten(0, (n, count + 1)).flatten(1, 2)

    def features(self, views: Tensor, window: Tensor | int | None = None) -> Tensor:
        """Views `[N, 3, S, S]`, each in its window `[N]` (-1: none) -> what leaves the last block, `[N, M, width]`."""
        c = self.config
        sides = _check.shapes(images=(views, "N 3 H W"))
        h, w = sides["H"] // c.patch, sides["W"] // c.patch
        if not h or not w or sides["H"] % c.patch or sides["W"] % c.patch:
            raise ValueError(
                f"images: got {sides['H']} x {sides['W']} pixels, expected whole patches of {c.patch}"
            )
        cut = views.unflatten(-1, (w, c.patch)).unflatten(-3, (h, c.patch))
        x = self.patch(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        x = self.pre_norm(x + interpolate_positions(self.positions, (h, w)))
        for block in self.blocks:
            x = block(x, window)
        return x

    def encode(self, views: Tensor, window: Tensor | int | None = None) -> Tensor:
        """Views `[N, 3, S, S]`, each in its window `[N]` (-1: none) -> `[N, grid^2, lm_width]`."""
        patch = self.config.patch
        x = self.features(views, window)
        x = self.resampler(x, grid_hw=(views.shape[-2] // patch, views.shape[-1] // patch))
        return self.post_norm(x) @ self.proj

    def published(self, source: str) -> Table:
        """Where the authors' file keeps the vision side's parameters."""
        c = self.config
        top = (
            Rule(r"patch\.weight", ("conv1.weight",), lambda t: t.flatten(1)),
            Rule("positions", ("positional_embedding",)),
            Rule("proj", ("proj",)),
            *renames(pre_norm="ln_pre", post_norm="ln_post"),
        )
        blocks = blocks_table(c.heads, c.windows, r"blocks\.(\d+)\.", "transformer.resblocks.{0}.")
        resampler = self.resampler.published(source).under("resampler.", "attn_pool.")
        return Table((*top, *blocks.rules, *resampler.rules), within="transformer.visual.")


class Monkey(QwenVL):
    """See `MonkeyConfig`: a Qwen-VL whose pictures, all of the canvas's size, take `slots` tokens each."""

    sources = ("monkey",)

    def make_vision(self) -> nn.Module:
        return MonkeyVision(self.config.vision)

    def opening(self, words: Sequence[int], pictures: int = 1) -> list[int]:
        """What is asked about pictures, up to where the answer begins; one image token for each."""
        return [*[self.tokens.image] * pictures, *words]

    def told(
        self,
        looked: Sequence[Any],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Expanded, Tensor]:
        """A text with one image token a row, and what `data.looks` made of its picture -> text and media for `forward`."""
        run = self.marks.image(self.tokens, self.config.slots)
        made = expand_images(input_ids, self.tokens, run, attention_mask=attention_mask, labels=labels)
        device = self.lm.embedding.weight.device
        canvases = torch.stack([one.canvas for one in looked]).to(device)
        return made, self.encode(canvases.unflatten(0, (len(input_ids), -1)))

    def published(self, source: str) -> Table:
        """The released file: `transformer.visual` beside the language model's layers."""
        vision = Table(self.vision.published(source).rules).under("vision.", "transformer.visual.")
        return vision + self.lm.published("qwen").under("lm.", "")
