"""MoE-LLaVA: a picture's patches in the text of a decoder whose feed-forwards are, in some layers, experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.layers._published import Table, renames
from mmkernels.layers.decoder import Block, Decoder, DecoderConfig
from mmkernels.layers.moe import ExpertsConfig
from mmkernels.layers.projector import Projector
from mmkernels.layers.upcycling import Placement, has_experts, idle_parameters, make_dense, placed, upcycle
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import Cache, MultimodalModel, Tokens, fill_places
from mmkernels.models.places import expand_images
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

BALANCE = "balance"  # the loss by which a stage says that it trains experts


@dataclass(frozen=True)
class MoeLlavaConfig:
    """A whole MoE-LLaVA. `placement` says which layers have experts (see `layers.upcycling.placed`).

    `stages` are its training recipe; the last one says what a freshly built model trains. `tokens.image` stands for one visual
    token; it needs no row in the embedding.
    """

    vision: VisionConfig
    lm: DecoderConfig
    experts: ExpertsConfig
    tokens: Tokens
    stages: tuple[Stage, ...]
    placement: Placement = "sparse"

    @property
    def places(self) -> int:
        """Tokens of a picture."""
        return self.vision.patches


class Parameters(NamedTuple):
    """Of the language model: all, and those that one token meets."""

    total: int
    activated: int


class MoeLlava(MultimodalModel):
    """See `MoeLlavaConfig`. Pictures take the places of `tokens.image` in the text, in order; `expand` makes room for them.

    The weight of the balancing losses in `loss` is 0.01, as published. Padding is zero and is routed, as in the published code.
    `enter` makes the model dense for a stage without the loss "balance", and gives it experts, copies of the dense
    feed-forwards, for one that has it.
    """

    sources = ("moe_llava",)
    packs = False  # padding is routed, and counts towards the capacity

    def __init__(self, config: MoeLlavaConfig) -> None:
        super().__init__()
        self.config, self.tokens, c = config, config.tokens, config
        self.layers = placed(c.placement, c.lm.layers)  # those with experts
        self.vision = VisionTower(c.vision)
        self.projector = Projector("mlp2x_gelu", c.vision.width, c.lm.block.width)
        routed = replace(c.lm.block, experts=c.experts)
        self.lm = Decoder(c.lm, (), lambda layer: Block(routed if layer in self.layers else c.lm.block))
        c.stages[-1].freeze(self)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def enter(self, stage: Stage) -> None:
        """Dense or with experts, as the stage needs it; then what it trains learns, and the rest does not."""
        experts = BALANCE in stage.losses
        if experts and not has_experts(self.lm):
            upcycle(self.lm, self.config.experts, self.layers)
        elif not experts:
            make_dense(self.lm)
        super().enter(stage)

    def parameters_of_lm(self) -> Parameters:
        """As published: without the vision tower and the projector."""
        total = sum(p.numel() for p in self.lm.parameters())
        return Parameters(total, total - idle_parameters(self.lm))

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Ids with one token a picture -> ids and mask `[B, T']` with a place for every patch, padded on the right.

        Without a mask all but the padding token counts as text. **Raises** ValueError for videos.
        """
        if frames != 1:
            raise ValueError(f"frames: got {frames}, expected 1: MoE-LLaVA reads pictures")
        mask = input_ids != self.tokens.pad if attention_mask is None else attention_mask
        made = expand_images(input_ids, self.tokens, self.config.places, attention_mask=mask)
        return made.ids, made.mask

    def encode(self, images: Tensor) -> Tensor:
        """images `[B, I, 3, H, W]` -> `[B, I, places, C]`."""
        size = _check.shapes(images=(images, "B I 3 H W"))
        patches = self.vision(images.flatten(0, 1))
        return self.projector(patches.to(self.projector.input.weight.dtype)).unflatten(
            0, (size["B"], size["I"])
        )

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> None:
        """Nothing between the blocks; on CPU the places are counted."""
        rows = 0
        if media is not None:
            shape = f"B I {self.config.places} {self.config.lm.block.width}"
            rows = self.config.places * _check.shapes(input_ids=(input_ids, "B T"), media=(media, shape))["I"]
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        counts = (input_ids == self.tokens.image).sum(1)
        if bool(((counts != rows) & (counts != 0)).any()):
            raise ValueError(
                f"input_ids: got {counts.tolist()} image tokens, expected {rows} in every row, or 0 without any; see expand"
            )

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Token embeddings, a row's pictures at its places."""
        place = input_ids == self.tokens.image
        x = self.lm.embed(torch.where(place, 0, input_ids))
        if media is None or media.shape[1] == 0:
            return self.keep_reachable(x, [self.vision, self.projector], self.config.vision.image_size)
        return fill_places(x, place, media.flatten(1, 2))

    def place(
        self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, condition: Any
    ) -> tuple[Tensor, Any]:
        """As for other families; padding is zero, as the router sees it too."""
        if attention_mask is not None:
            x = torch.where(attention_mask.unsqueeze(-1), x, 0)
        return super().place(x, attention_mask, cache, condition)

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        known = ids if ids.is_floating_point() else torch.where(ids == self.tokens.image, 0, ids)
        super()._check(known, mask, labels, cache)

    def published(self, source: str) -> Table:
        """The released file: language model, projector, and CLIP where it was saved with them.

        A model that has entered a dense stage reads the files of that stage.
        """
        root = "transformer." if self.config.lm.family == "qwen" else "model."
        joint = Table(renames(input="0", output="2"))
        table = joint.under("projector.", f"{root}mm_projector.image_spatial_proj.")
        table += self.lm.published(self.config.lm.family).under("lm.", "")
        tower = self.vision.published("huggingface_clip")
        beyond = (rf"encoder\.layers\.({'|'.join(map(str, range(self.config.vision.layers, 48)))})\..*",)
        at = f"{root}image_tower.image_tower.vision_model."
        table += replace(tower, within="").under("vision.", at)
        return table + Table((), absent=(r"vision\..*",)) + Table((), ignored=beyond).under("", at)
