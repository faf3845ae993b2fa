"""Qwen-VL: a ViT whose patches a one-layer resampler turns into 256 tokens, written over the text's image slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.qwen_resampler import QwenResampler
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import Cache, MultimodalModel, Tokens
from mmkernels.models.places import expand_images
from mmkernels.models.qwen_text import Marks, check_slots, image_places
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check


@dataclass(frozen=True)
class QwenVLConfig:
    """A whole Qwen-VL: `grid^2` tokens for an image, read by `heads` heads of the language model's width.

    `stages` are its training recipe; the last one says what a freshly built model trains.
    """

    vision: VisionConfig
    grid: int
    heads: int
    lm: DecoderConfig
    tokens: Tokens
    marks: Marks
    stages: tuple[Stage, ...]

    @property
    def slots(self) -> int:
        return self.grid**2


class QwenVision(nn.Module):
    """Images to language-model tokens: `LN(resampler(tower(images))) proj`. Images of any size are whole patches each way.

    **Source** Qwen-VL (arXiv 2308.12966); `transformer.visual` of its files loads by `weights.load` as `qwen_vl`.
    """

    sources = ("qwen_vl",)

    def __init__(self, vision: VisionConfig, grid: int, width: int, heads: int) -> None:
        super().__init__()
        self.tower = VisionTower(vision)
        self.resampler = QwenResampler(grid, width, heads, vision.width)
        self.post_norm = nn.LayerNorm(width, vision.eps)
        self.proj = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """images `[N, 3, H, W]`, normalised -> `[N, grid^2, width]`. **Raises** ValueError for shapes."""
        x = self.tower(images)
        patch = self.tower.config.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        x = self.resampler(x.to(self.resampler.query.dtype), grid_hw=grid)  # a frozen tower may be narrow
        return self.post_norm(x) @ self.proj

    def published(self, source: str) -> Table:
        """Where the authors' file keeps the vision side's parameters."""
        tower = Table(self.tower.published(source).rules).under("tower.", "")
        resampler = self.resampler.published(source).under("resampler.", "attn_pool.")
        rest = Table((*renames(post_norm="ln_post"), Rule("proj", ("proj",))))
        return Table((tower + resampler + rest).rules, within="transformer.visual.")


class QwenVL(MultimodalModel):
    """See `QwenVLConfig`. An image token, as many slots as an image has tokens, an image end: what stands in the slots is not
    read, the image's tokens take its place. Everything is causal, and images count as text positions.
    """

    sources = ("qwen_vl",)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.tokens, self.marks = config, config.tokens, config.marks
        self.vision = self.make_vision()
        self.lm = Decoder(config.lm)
        config.stages[-1].freeze(self)

    def make_vision(self) -> Any:
        """The vision side; families whose pictures are read in another way make another."""
        c = self.config
        return QwenVision(c.vision, c.grid, c.lm.block.width, c.heads)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Ids with one token an image -> ids and mask `[B, T']` with every image's slots and end, padded on the right.

        Without a mask all but the padding token counts as text. **Raises** ValueError for videos.
        """
        if frames != 1:
            raise ValueError(f"frames: got {frames}, expected 1: Qwen-VL reads pictures")
        mask = input_ids != self.tokens.pad if attention_mask is None else attention_mask
        image = self.marks.image(self.tokens, self.config.slots)
        made = expand_images(input_ids, self.tokens, image, attention_mask=mask)
        return made.ids, made.mask

    def encode(self, images: Tensor) -> Tensor:
        """images `[B, I, 3, H, W]` -> `[B, I, grid^2, C]`; a frozen side records no gradient."""
        size = _check.shapes(images=(images, "B I 3 H W"))
        return self.vision(images.flatten(0, 1)).unflatten(0, (size["B"], size["I"]))

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> None:
        """Nothing between the blocks; on CPU the slots are checked, also those of a text whose images were left out."""
        slots, images = self.config.slots, 0
        if media is not None:
            shape = f"B I {slots} {self.config.lm.block.width}"
            images = _check.shapes(input_ids=(input_ids, "B T"), media=(media, shape))["I"]
        begins = cache is None or cache.text.length == 0
        if (begins or images) and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_slots(input_ids, self.tokens, self.marks, slots, images)

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Token embeddings, the k-th image of a row over the slots of its k-th image token."""
        x = self.lm.embed(input_ids)
        if media is None or media.shape[1] == 0:
            return self.keep_reachable(x, [self.vision], self.config.vision.image_size)
        slots, width = self.config.slots, self.config.lm.block.width
        image, place = image_places(input_ids, self.tokens.image)
        inside = (place >= 0) & (place < slots) & (image < media.shape[1])
        index = torch.where(inside, image * slots + place, 0).unsqueeze(-1).expand(-1, -1, width)
        seen = media.flatten(1, 2).gather(1, index).to(x.dtype)
        return torch.where(inside.unsqueeze(-1), seen, x)

    def published(self, source: str) -> Table:
        """The released file: `transformer.visual` beside the language model's layers."""
        vision = Table(self.vision.published(source).rules).under("vision.", "transformer.visual.")
        return vision + self.lm.published("qwen").under("lm.", "")

    def loss(self, batches: dict[str, dict[str, Tensor]], stage: Stage) -> Tensor:
        """The stage's weighted sum of the losses of a step's batches, each given as `forward`'s arguments by name."""
        unknown = sorted(set(batches) ^ set(stage.losses))
        if unknown:
            raise ValueError(f"batches: got {sorted(batches)}, expected {sorted(stage.losses)}")
        losses = [weight * self(**batches[name]).loss for name, weight in stage.losses.items()]
        return torch.stack(losses).sum()
