"""LLaVA-UHD: slices of any size through one ViT, each compressed to a few tokens, with commas and newlines between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmkernels.layers._published import Table
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.spatial_resampler import SpatialResampler
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import Tokens
from mmkernels.models.spliced import TOWER, Spliced
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

Pictures = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class LlavaUHDConfig:
    """A whole LLaVA-UHD: `grid^2` tokens for a slice, read by `heads` heads as `release` ("original", "eccv") has it.

    `vision.any_size` has to be set: slices have sizes of their own. `tokens.image` stands for one visual token; `comma` and
    `newline` are the words behind a slice and behind a row of them. A picture is cut into at most `max_slices`. `stages` are
    the training recipe, and those named in `single` show the whole picture alone; the last one says what a freshly built model
    trains.
    """

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    comma: int
    newline: int
    grid: int
    heads: int
    stages: tuple[Stage, ...]
    release: str = "original"
    max_slices: int | None = None
    single: tuple[str, ...] = ()

    @property
    def look(self) -> dict[str, Any]:
        """How pictures are cut: arguments of `data.looks.look`. The original release does not normalise pixels."""
        options = {
            "max_slices": self.max_slices, "scale": self.vision.image_size, "release": self.release,
            "patch": self.vision.patch_size, "tokens_per_view": self.grid**2,
        }  # fmt: skip
        return {
            "rule": "llava_uhd",
            "options": options,
            "pixels": "clip" if self.release == "eccv" else "unit",
        }


def pack_image(image: Tensor, patch: int = 14, grid: int = 24) -> Tensor:
    """A slice's patches, row by row, laid out anew as a square of `grid x grid` patches, with zeros behind them.

    So a ViT of fixed size reads slices of any shape; where patch k stood its position has to say.

    **Shapes** image `[C, H, W]`, whole patches each way, at most `grid^2` -> `[C, grid patch, grid patch]`. **Dtypes** any.
    **Gradient** image. **Raises** ValueError for shapes and for too many patches. **Source** LLaVA-UHD (arXiv 2403.11703).
    """
    _check.positive(patch=patch, grid=grid)
    size = _check.shapes(image=(image, "C H W"))
    h, w = size["H"] // patch, size["W"] // patch
    if not h or not w or size["H"] % patch or size["W"] % patch or h * w > grid**2:
        raise ValueError(
            f"image: got {size['H']} x {size['W']} pixels, expected whole patches of {patch}, at most {grid**2} of them"
        )
    cut = image.unflatten(-1, (w, patch)).unflatten(-3, (h, patch))  # C, h, patch, w, patch
    rows = cut.permute(1, 3, 0, 2, 4).flatten(0, 1)
    rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, grid**2 - h * w)).unflatten(0, (grid, grid))
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


class LlavaUHD(Spliced):
    """See `LlavaUHDConfig`. A picture's tokens are those of its slices, row by row, each slice with its comma or newline in the
    text, and at last those of the whole picture, without one.
    """

    sources = ("llava_uhd",)

    def __init__(self, config: LlavaUHDConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokens, width = c.tokens, c.lm.block.width
        if not c.vision.any_size:
            raise ValueError("vision: got any_size False, expected a tower for slices of any size")
        self.vision = VisionTower(c.vision)
        self.resampler = SpatialResampler(c.grid, width, c.heads, c.vision.width, release=c.release)
        self.lm = Decoder(c.lm)
        self.enter(c.stages[-1])

    def enter(self, stage: Stage) -> None:
        """Trains what the stage trains, and is told of pictures as it is."""
        super().enter(stage)
        self.single = stage.name in self.config.single

    def sees(self) -> Sequence[nn.Module]:
        return self.vision, self.resampler

    def nothing(self, like: Tensor) -> Tensor:
        side = self.config.vision.patch_size
        return like.new_zeros(1, 3, side, side)

    def run(self, columns: int, rows: int) -> list[int]:
        """The ids of a picture cut into a grid of slices: what a plan of `data.slicing.llava_uhd` gives."""
        c = self.config
        view = [c.tokens.image] * c.grid**2
        if columns * rows == 1:
            return view
        row = [*view, c.comma] * (columns - 1) + [*view, c.newline]
        return row * rows + view

    def layout(self, one: Any) -> list[int]:
        return self.run(1, 1) if self.single else super().layout(one)

    def shown(self, one: Any) -> Sequence[Tensor]:
        return one.views[-1:] if self.single else one.views

    def encode(self, images: Pictures) -> Tensor:  # type: ignore[override]
        """Slices `[S, 3, H, W]`, or a sequence of `[3, H, W]` of any sizes, one after another -> `[V, C]`.

        **Raises** ValueError for sizes that are no whole patches.
        """
        pictures = list(images)
        if not pictures:
            return self.resampler.query.new_zeros(0, self.resampler.query.shape[1])
        x, slice_hw = self.features(pictures)
        return self.resampler(x.to(self.resampler.query.dtype), slice_hw).flatten(0, 1)

    def features(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Slices -> the tower's tokens `[S, M, C]`, zeros behind each slice's own, and their grids `[S, 2]` on the host.

        The tower reads all slices in one packed pass.
        """
        patch = self.config.vision.patch_size
        for picture in pictures:
            size = _check.shapes(images=(picture, "3 H W"))
            if 0 in (size["H"], size["W"]) or size["H"] % patch or size["W"] % patch:
                raise ValueError(
                    f"images: got {size['H']} x {size['W']} pixels, expected whole patches of {patch}"
                )
        slice_hw = torch.tensor([(p.shape[-2] // patch, p.shape[-1] // patch) for p in pictures])
        rows = torch.cat([_patches(picture, patch) for picture in pictures])
        packed = self.vision(rows, slice_hw.to(rows.device))
        return pad_sequence(packed.split(slice_hw.prod(1).tolist()), batch_first=True), slice_hw

    def published(self, source: str) -> Table:
        """The authors' file; the tower, which they never train, may be missing."""
        tower = self.vision.published("huggingface_clip").under("vision.", TOWER)
        joint = Table(self.resampler.published(source).rules).under("resampler.", "model.mm_projector.")
        return (
            self.lm.published(self.lm.config.family).under("lm.", "")
            + tower
            + joint
            + Table((), absent=(r"vision\..*",))
        )


def _patches(picture: Tensor, patch: int) -> Tensor:
    """`[3, H, W]` -> `[P, 3 patch^2]`, row by row, channels outermost inside a patch."""
    cut = picture.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    return cut.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
