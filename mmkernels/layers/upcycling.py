"""From a dense decoder to one with experts, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mmkernels.layers.decoder import Block, Decoder
from mmkernels.layers.mlp import MLP
from mmkernels.layers.moe import ExpertsConfig, MoE
from mmkernels.primitives import _check

Placement = str | int | Sequence[int]
PLACEMENTS = ("sparse", "dense", "first_half", "second_half")


def placed(placement: Placement, layers: int) -> tuple[int, ...]:
    """The layers that have experts: "sparse" (0, 2, 4, ...), "dense" (all), "first_half", "second_half", the interval n
    (0, n, 2 n, ...), or their numbers.

    **Raises** ValueError for other names, an interval below 1, and layers that are none.
    """
    _check.positive(layers=layers)
    every = range(layers)
    if isinstance(placement, str):
        _check.choice("placement", placement, PLACEMENTS)
        half = layers // 2
        return tuple(
            {"sparse": every[::2], "dense": every, "first_half": every[:half]}.get(placement, every[half:])
        )
    if isinstance(placement, int):
        _check.positive(placement=placement)
        return tuple(every[::placement])
    wrong = [n for n in placement if n not in every]
    if wrong or len(set(placement)) != len(placement):
        raise ValueError(
            f"placement: got layers {list(placement)}, expected distinct ones of 0 to {layers - 1}"
        )
    return tuple(sorted(placement))


def upcycle(decoder: Decoder, experts: ExpertsConfig, placement: Placement = "sparse") -> tuple[int, ...]:
    """Puts experts that are copies of the layer's own feed-forward into the layers of `placed`, in place; routers are new.

    Where weights add up to 1 (all policies but top 1) the decoder computes what it did before. Returns the layers.
    **Raises** ValueError for layers that have experts already or are no `Block`; nothing is changed then.
    """
    layers = placed(placement, len(decoder.blocks))
    blocks = [_dense_block(decoder, layer) for layer in layers]
    for block in blocks:
        assert isinstance(block.mlp, MLP)  # just looked at
        block.mlp = MoE.of(block.mlp, experts)
        block.config = replace(block.config, experts=experts)
    return layers


def make_dense(decoder: Decoder) -> None:
    """Gives every layer that has experts its first one as its feed-forward, in place."""
    for block in decoder.blocks:
        if isinstance(block, Block) and isinstance(block.mlp, MoE):
            block.mlp = block.mlp.expert(0)
            block.config = replace(block.config, experts=None)


def idle_parameters(module: nn.Module) -> int:
    """How many parameters a token does not meet: those of the experts that it is not sent to."""
    idle = 0
    for part in module.modules():
        if isinstance(part, MoE):
            own = [p for p in (part.w_in, part.w_out, part.b_in, part.b_out) if p is not None]
            idle += sum(p[0].numel() for p in own) * (part.experts - part.top_k)
    return idle


def has_experts(module: nn.Module) -> bool:
    return any(isinstance(part, MoE) for part in module.modules())


def _dense_block(decoder: Decoder, layer: int) -> Block:
    block = decoder.blocks[layer]
    if not isinstance(block, Block):
        raise ValueError(
            f"decoder: layer {layer} is a {type(block).__name__}, expected Block with a dense feed-forward"
        )
    if not isinstance(block.mlp, MLP):
        raise ValueError(f"decoder: layer {layer} has experts already, expected a dense feed-forward")
    return block
