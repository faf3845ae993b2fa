"""SliME by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.vision import VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.llava_presets import CLIP_L_336
from mmkernels.models.slime import Mode, SlimeConfig
from mmkernels.models.stages import Stage

_PAIRS, _SFT = 558_128, 2.0e6
MODES = {  # global and local learn in turn: the perceptron, then the queries before it, then those of the tiles
    "whole": Mode(local=False, expert=0),
    "queries": Mode(local=False, expert=1),
    "tiles": Mode(whole=False, top_p=1.0),
    "instruct": Mode(),
}


def _align(name: str, *trainable: str) -> Stage:
    return Stage(
        name,
        trainable=trainable,
        losses={"pairs": 1.0},
        mix={"pairs": _PAIRS},
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.03,
        steps=round(_PAIRS / 256),
    )


def _stages(rate: float) -> tuple[Stage, ...]:
    instruct = Stage(
        "instruct",
        trainable=("adapter.*", "sampler.*", "lm.*"),
        losses={"instructions": 1.0},
        mix={"instructions": _SFT},
        learning_rate=rate,
        schedule="cosine",
        warmup=0.03,
        steps=round(_SFT / 128),
    )
    return (
        _align("whole", "adapter.projection.*"),
        _align("queries", "adapter.resampler.*"),
        _align("tiles", "sampler.*"),
        instruct,
    )


def _slime(lm: DecoderConfig, tokens: Tokens, separator: int, rate: float) -> SlimeConfig:
    return SlimeConfig(
        CLIP_L_336, lm, tokens, separator, grid=24, local_grid=12, heads=8, stages=_stages(rate), modes=MODES
    )


_VICUNA = Tokens(image=-200, end_of_chunk=2, end_of_text=2, pad=0)
_LLAMA3 = Tokens(image=-200, end_of_chunk=128_009, end_of_text=128_001, pad=128_001)
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


def _tiny() -> tuple[Stage, ...]:
    *align, instruct = _stages(1e-3)
    small = [replace(stage, learning_rate=2e-3, warmup=0.1, steps=60) for stage in align]
    last = replace(instruct, mix={"instructions": 1.0}, warmup=0.1, steps=300)
    return (_TOWERS, *small, last)


SLIME = {
    "slime-7b": _slime(language.LLAMA2_7B, _VICUNA, 1919, 2e-5),
    "slime-8b": _slime(language.LLAMA3_8B, _LLAMA3, 11, 1e-5),
    "slime-13b": _slime(language.LLAMA2_13B, _VICUNA, 1919, 2e-5),
    "slime-tiny": SlimeConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=128, layers=3, heads=4, hidden=256, activation="gelu"
        ),
        lm=replace(
            language.LLAMA_7B,
            block=replace(language.LLAMA_7B.block, width=128, heads=4, hidden=256),
            layers=4,
            vocab=512,
            std=0.3,
        ),
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        separator=511,  # above what texts need
        grid=4,
        local_grid=3,
        heads=4,
        stages=_tiny(),
        modes=MODES,
    ),
}
