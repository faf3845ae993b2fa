"""LLaVA-UHD by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.vision import VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.llava_presets import CLIP_L_336
from mmkernels.models.llava_uhd import LlavaUHDConfig
from mmkernels.models.stages import Stage


def _align(pairs: float, batch: int) -> Stage:
    return Stage(
        "align",  # the resampler alone; the ViT is never trained
        trainable=("resampler.*",),
        losses={"pairs": 1.0},
        mix={"pairs": pairs},
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.03,
        steps=round(pairs / batch),
    )


def _instruct(samples: float) -> Stage:
    return Stage(
        "instruct",
        trainable=("resampler.*", "lm.*"),
        losses={"instructions": 1.0},
        mix={"instructions": samples},
        learning_rate=2e-5,
        schedule="cosine",
        warmup=0.03,
        steps=round(samples / 128),
    )


_TOKENS = Tokens(image=-200, end_of_chunk=2, end_of_text=2, pad=0)
_TOWER = replace(CLIP_L_336, any_size=True)
_TINY_LM = replace(
    language.LLAMA_7B,
    block=replace(language.LLAMA_7B.block, width=128, heads=4, hidden=256),
    layers=4,
    vocab=512,
    std=0.3,
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the ViT learns to name pictures, the language model to write what it is shown
    trainable=("vision.*", "lm.*"),
    losses={"patches": 1.0, "echoes": 1.0},
    mix={"patches": 1.0, "echoes": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=400,
)

LLAVA_UHD = {
    "llava-uhd-13b": LlavaUHDConfig(
        _TOWER, language.LLAMA2_13B, _TOKENS, comma=29_892, newline=13, grid=8, heads=8,
        stages=(_align(595_375, 256), _instruct(656e3)),
    ),
    "llava-uhd-eccv-13b": LlavaUHDConfig(
        _TOWER, language.LLAMA2_13B, _TOKENS, comma=29_892, newline=13, grid=12, heads=40,
        stages=(_align(558_128, 256), _instruct(665_298)), release="eccv", single=("align",),
    ),
    "llava_uhd-tiny": LlavaUHDConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=128, layers=3, heads=4, hidden=256, activation="gelu", any_size=True
        ),
        lm=_TINY_LM,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        comma=510,
        newline=511,  # above what texts need
        grid=4,
        heads=4,
        stages=(
            _TOWERS,
            replace(_align(1, 1), learning_rate=4e-3, warmup=0.1, steps=100),
            replace(_instruct(1), mix={"instructions": 1.0}, learning_rate=1e-3, warmup=0.1, steps=300),
        ),
        release="eccv",
        single=("align",),
    ),
}  # fmt: skip
