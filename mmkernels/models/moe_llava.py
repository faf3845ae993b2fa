"""MoE-LLaVA: a LLaVA whose decoder has, in some layers, experts in the place of the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.layers._published import Table, renames
from mmkernels.layers.decoder import Block, Decoder
from mmkernels.layers.moe import ExpertsConfig
from mmkernels.layers.upcycling import Placement, has_experts, idle_parameters, make_dense, placed, upcycle
from mmkernels.models.base import Cache
from mmkernels.models.llava import Llava, LlavaConfig
from mmkernels.models.stages import Stage

BALANCE = "balance"  # the loss by which a stage says that it trains experts


@dataclass(frozen=True)
class MoeLlavaConfig(LlavaConfig):
    """A `LlavaConfig` with `experts` in the layers of `placement` (see `layers.upcycling.placed`)."""

    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    placement: Placement = "sparse"


class Parameters(NamedTuple):
    """Of the language model: all, and those that one token meets."""

    total: int
    activated: int


class MoeLlava(Llava):
    """See `MoeLlavaConfig`. `loss` has 0.01 of the layers' balancing losses, as published; padding is zero and is routed, as in
    the published code.

    `enter` makes the model dense for a stage without the loss "balance", and gives it experts, copies of the dense
    feed-forwards, for one that has it.
    """

    sources = ("moe_llava",)
    packs = False  # padding is routed, and counts towards the capacity

    def __init__(self, config: MoeLlavaConfig) -> None:
        self.layers = placed(config.placement, config.lm.layers)  # those with experts
        super().__init__(config)
        e = config.experts
        # without padding routing is the same only where nobody is ever dropped
        self.packs = e.eval_capacity_factor is None or e.eval_capacity_factor * e.top_k >= e.experts

    def language_model(self) -> Decoder:
        """The decoder, with its experts."""
        lm = self.config.lm
        routed = replace(lm.block, experts=self.config.experts)
        return Decoder(lm, (), lambda layer: Block(routed if layer in self.layers else lm.block))

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

    def place(
        self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, condition: Any
    ) -> tuple[Tensor, Any]:
        """As for other families; padding is zero, as the router sees it too."""
        if attention_mask is not None:
            x = torch.where(attention_mask.unsqueeze(-1), x, 0)
        return super().place(x, attention_mask, cache, condition)

    def published(self, source: str) -> Table:
        """The released file: language model, projector, and CLIP where it was saved with them.

        A model that has entered a dense stage reads the files of that stage.
        """
        root = "transformer." if self.config.lm.family == "qwen" else "model."
        joint = Table(renames(input="0", output="2"))
        table = joint.under("projector.", f"{root}mm_projector.image_spatial_proj.")
        table += self.lm.published(self.config.lm.family).under("lm.", "")
        tower = self.vision.published("huggingface_clip")
        table += tower.under("vision.", f"{root}image_tower.image_tower.vision_model.")
        return table + Table((), absent=(r"vision\..*",))
