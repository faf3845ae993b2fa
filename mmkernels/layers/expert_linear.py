"""Pairs of linear maps, one for each modality, and what the layers that have them share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.layers.attention import Visibility
from mmkernels.layers.visual_expert_tables import SOURCES
from mmkernels.ops.visual_expert import expert_mask, modality_linear
from mmkernels.primitives import _check
from mmkernels.primitives.routing import Groups, route_groups


class Shared(NamedTuple):
    """What all layers of a forward pass have in common: which rows are whose expert's, what tokens see, and where they are."""

    groups: Groups
    seen: Visibility


def route_tokens(token_types: Tensor) -> Groups:
    """The rows of `[B, L]` tokens, flat, as text's and vision's: `expert_mask`, brought together."""
    return route_groups(expert_mask(token_types).flatten())


class ExpertLinear(nn.Module):
    """Two linear maps of one shape; a row takes that of its modality. `bias` is for (text, vision)."""

    def __init__(self, inputs: int, outputs: int, bias: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.text, self.vision = (nn.Linear(inputs, outputs, b) for b in bias)

    def forward(self, x: Tensor, groups: Groups, residual: Tensor | None = None) -> Tensor:
        """x `[R, C]`, rows as `groups` counts them."""
        text, vision = self.text, self.vision
        return modality_linear(
            x, groups, text.weight, vision.weight, text.bias, vision.bias, residual=residual
        )


class Expert(nn.Module):
    """What the three modules share."""

    sources = SOURCES

    @torch.no_grad()
    def copy_text_to_vision(self) -> None:
        """Lets the vision expert start as the text expert, as CogVLM's training does; a bias that only vision has is 0."""
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.vision.weight.copy_(module.text.weight)
                if module.vision.bias is not None:
                    own = module.text.bias
                    module.vision.bias.copy_(torch.zeros_like(module.vision.bias) if own is None else own)


def check_tokens(x: Tensor, width: int, token_types: Tensor, positions: Tensor | None = None) -> None:
    _check.shapes(x=(x, f"B L {width}"), token_types=(token_types, "B L"), positions=(positions, "B L"))
    _check.dtypes((torch.int64, torch.int32), positions=positions)
    _check.devices(x=x, token_types=token_types, positions=positions)
