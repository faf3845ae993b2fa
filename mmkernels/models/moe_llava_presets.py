"""MoE-LLaVA by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.moe import ExpertsConfig
from mmkernels.layers.vision import CLIP_L, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.moe_llava import MoeLlavaConfig
from mmkernels.models.stages import Stage

_FFN = ("lm.blocks.*.mlp.*",)  # the published rule is by name: feed-forwards of dense layers learn too
_EXPERTS = ExpertsConfig(4, 2, "deepspeed_top2", capacity_factor=1.5, eval_capacity_factor=2.0)
_CLIP = replace(CLIP_L, image_size=336, layers=23)  # the last layer but one is read


def _stage(
    name: str, trainable: tuple[str, ...], losses: dict[str, float], samples: float, rate: float
) -> Stage:
    (kind, *_) = losses
    return Stage(name, trainable, losses, {kind: samples}, rate, schedule="cosine", warmup=0.03)


_ALIGN = _stage("projector", ("projector.*",), {"captions": 1.0}, 558e3, 1e-3)
_TUNE = _stage("instructions", ("projector.*", "lm.*"), {"instructions": 1.0}, 964e3, 2e-5)
_ROUTE = _stage("experts", _FFN, {"instructions": 1.0, "balance": 0.01}, 665e3, 2e-5)


def _moe_llava(lm: DecoderConfig, end: int) -> MoeLlavaConfig:
    tokens = Tokens(image=-200, end_of_chunk=end, end_of_text=end, pad=end)
    return MoeLlavaConfig(_CLIP, lm, _EXPERTS, tokens, (_ALIGN, _TUNE, _ROUTE))


_TINY_LM = replace(
    language.STABLELM_1_6B,
    block=replace(language.STABLELM_1_6B.block, width=128, heads=4, hidden=256),
    layers=4,
    vocab=512,
    std=0.3,
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns to name pictures, the language model to write what it reads
    trainable=("vision.*", "lm.*"),
    losses={"pictures": 1.0, "echoes": 1.0},
    mix={"pictures": 2.0, "echoes": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=400,
)

MOE_LLAVA = {
    "moe_llava-phi2-2.7bx4-top2": _moe_llava(language.PHI_2, 50_256),
    "moe_llava-stablelm-1.6bx4-top2": _moe_llava(language.STABLELM_1_6B, 100_257),
    "moe_llava-qwen-1.8bx4-top2": _moe_llava(language.QWEN_1_8B, 151_643),
    "moe_llava-tiny": MoeLlavaConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=128, layers=3, heads=4, hidden=256, activation="gelu"
        ),
        lm=_TINY_LM,
        experts=_EXPERTS,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        stages=(
            _TOWERS,
            replace(_ALIGN, learning_rate=2e-3, warmup=0.1, steps=200),
            replace(_TUNE, learning_rate=1e-3, warmup=0.1, steps=150),
            replace(_ROUTE, learning_rate=1e-3, warmup=0.1, steps=150),
        ),
    ),
}
