"""CogVLM by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import BlockConfig, DecoderConfig
from mmkernels.layers.vision import EVA_E, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.cogvlm import CogVLMConfig
from mmkernels.models.stages import Stage

_ADDED = ("lm.blocks.*.vision.*", "projector.*")  # all that is trained, but for the tower at last
_TEXT = ("lm.embedding.*", "lm.blocks.*.text.*", "lm.blocks.*_norm.*", "lm.norm.*", "lm.head.*")
_CAPTIONING = Stage(
    "captioning",
    trainable=_ADDED,
    losses={"captions": 1.0},
    mix={"captions": 1.5e9},
    learning_rate=1e-4,
    weight_decay={"*": 0.05},
    schedule="cosine",
    warmup=12_000,
    steps=120_000,
    betas=(0.9, 0.95),
    image_size=224,
)
_REFERRING = replace(
    _CAPTIONING,
    name="referring",
    losses={"captions": 1.0, "boxes": 1.0},
    mix={"captions": 1.0, "boxes": 1.0},
    learning_rate=1e-5,
    warmup=1200,
    steps=60_000,
)
_SFT = replace(
    _REFERRING,
    name="sft",
    trainable=(*_ADDED, "vision.*"),
    losses={"instructions": 1.0},
    mix={"instructions": 1.0},
    warmup=0.01,
    steps=6_000,
    rates={"vision.*": 0.1},
)
_RECIPE = (_CAPTIONING, replace(_REFERRING, image_size=490), replace(_SFT, image_size=490))


def _small(
    stage: Stage, losses: dict[str, float], rate: float, steps: int, mix: dict[str, float] | None = None
) -> Stage:
    """A published stage with what it freezes, at the length and rate of a model that is no larger than a test."""
    return replace(
        stage, losses=losses, mix=mix or dict.fromkeys(losses, 1.0), learning_rate=rate, steps=steps, warmup=0.1,
        image_size=None, betas=(0.9, 0.98),
    )  # fmt: skip


_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns what is where, the language model to tell what it is shown
    trainable=("vision.*", *_TEXT),
    losses={"patches": 1.0, "echoes": 1.0},
    mix={"patches": 2.0, "echoes": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.1,
    steps=500,
)
_TINY_LM = DecoderConfig(
    "llama",
    BlockConfig(128, 4, 256, activation="swiglu", norm="rms", qkv_bias=False, out_bias=False, mlp_bias=False),
    layers=4,
    vocab=512,
    std=0.3,
)
_LLAMA, _LLAMA3 = language.LLAMA2_7B, language.LLAMA3_8B

COGVLM = {
    "cogvlm-17b": CogVLMConfig(
        vision=replace(EVA_E, image_size=490),
        lm=_LLAMA,
        tokens=Tokens(image=-200, end_of_chunk=2, end_of_text=2, pad=0),
        begin=1,
        hidden=11_008,
        stages=_RECIPE,
        table_mode="model_dtype",
    ),
    "cogvlm2-19b": CogVLMConfig(
        vision=replace(EVA_E, image_size=1344),
        lm=_LLAMA3,
        tokens=Tokens(image=-200, end_of_chunk=128_001, end_of_text=128_001, pad=128_002),
        begin=128_000,
        hidden=14_336,
        stages=tuple(replace(stage, image_size=1344) for stage in _RECIPE),
        conv=True,
        vision_bias=True,
        table_mode="model_dtype",
    ),
    "cogvlm-tiny": CogVLMConfig(
        vision=VisionConfig(
            image_size=48, patch_size=8, width=96, layers=3, heads=4, hidden=192, activation="gelu", eps=1e-6,
            pre_norm=False, patch_bias=True, keep_class=True, norm_after=True,
        ),
        lm=_TINY_LM,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        begin=1,
        hidden=256,
        stages=(
            _TOWERS,
            _small(_CAPTIONING, {"captions": 1.0}, 2e-3, 50),
            _small(_REFERRING, {"captions": 0.2, "boxes": 1.0}, 3e-3, 400),
            _small(_SFT, {"captions": 0.2, "boxes": 1.0}, 1.5e-3, 75),
        ),
    ),
}  # fmt: skip
