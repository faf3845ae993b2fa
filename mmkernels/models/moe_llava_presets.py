"""MoE-LLaVA by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.moe import ExpertsConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.llava_presets import CLIP_L_336, LLAVA
from mmkernels.models.moe_llava import BALANCE, MoeLlavaConfig
from mmkernels.models.stages import Stage

_FFN = ("lm.blocks.*.mlp.*",)  # the published rule is by name: feed-forwards of dense layers learn too
_EXPERTS = ExpertsConfig(4, 2, "deepspeed_top2", capacity_factor=1.5, eval_capacity_factor=2.0)


def _stage(
    name: str, trainable: tuple[str, ...], losses: dict[str, float], samples: float, rate: float
) -> Stage:
    (kind, *_) = losses
    return Stage(name, trainable, losses, {kind: samples}, rate, schedule="cosine", warmup=0.03)


_ALIGN = _stage("projector", ("projector.*",), {"pairs": 1.0}, 558e3, 1e-3)
_TUNE = _stage("instructions", ("projector.*", "lm.*"), {"instructions": 1.0}, 964e3, 2e-5)
_ROUTE = _stage("experts", _FFN, {"instructions": 1.0, BALANCE: 0.01}, 665e3, 2e-5)


def _moe_llava(lm: DecoderConfig, end: int) -> MoeLlavaConfig:
    tokens = Tokens(image=-200, end_of_chunk=end, end_of_text=end, pad=end)
    return MoeLlavaConfig(CLIP_L_336, lm, tokens, (_ALIGN, _TUNE, _ROUTE), experts=_EXPERTS)


_TINY = LLAVA["llava-1.5-tiny"]
_TINY_LM = replace(
    language.STABLELM_1_6B,
    block=replace(language.STABLELM_1_6B.block, width=128, heads=4, hidden=256),
    layers=4,
    vocab=512,
    std=0.3,
)


def _small(stage: Stage, rate: float, steps: int) -> Stage:
    """A published stage with what it freezes, at the length and rate of a model that is no larger than a test."""
    return replace(stage, learning_rate=rate, steps=steps, warmup=0.1, betas=(0.9, 0.98))


MOE_LLAVA = {
    "moe_llava-phi2-2.7bx4-top2": _moe_llava(language.PHI_2, 50_256),
    "moe_llava-stablelm-1.6bx4-top2": _moe_llava(language.STABLELM_1_6B, 100_257),
    "moe_llava-qwen-1.8bx4-top2": _moe_llava(language.QWEN_1_8B, 151_643),
    "moe_llava-tiny": MoeLlavaConfig(
        vision=_TINY.vision,
        lm=_TINY_LM,
        tokens=_TINY.tokens,
        stages=(
            _TINY.stages[0],
            _small(_ALIGN, 2e-3, 100),
            _small(_TUNE, 1e-3, 150),
            _small(_ROUTE, 1e-3, 150),
        ),
        template=_TINY.template,
        experts=_EXPERTS,
    ),
}
