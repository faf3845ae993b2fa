"""Monkey by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.monkey import MonkeyConfig, VisionConfig
from mmkernels.models.qwen_text import Marks
from mmkernels.models.stages import Stage

_INSTRUCTIONS = Stage(
    "instructions",  # of the vision side only the resampler and the windows' updates: its norm and projection stay as they are
    trainable=("lm.*", "vision.resampler.*", "vision.*_lora.*"),
    losses={"instructions": 1.0},
    mix={"instructions": 1.44e6},
    learning_rate=1e-5,
    weight_decay={"*norm.weight": 0.0, "*.scale": 0.0, "*.weight": 0.1, "*_lora.*": 0.1},
    betas=(0.9, 0.95),
    schedule="cosine",
    warmup=0.02,
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the ViT learns to name pictures, the language model to write what it sees
    trainable=(
        "vision.patch.*", "vision.positions", "vision.pre_norm.*", "vision.blocks.*.attention*", "vision.blocks.*.mlp.*",
        "vision.blocks.*.mlp_norm.*", "lm.*",
    ),
    losses={"patches": 1.0, "echoes": 1.0},
    mix={"patches": 1.0, "echoes": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=400,
)  # fmt: skip
_PRETRAIN = Stage(
    "pretrain",  # what Monkey takes from Qwen-VL: no updates yet
    trainable=(*_TOWERS.trainable[:-1], "vision.resampler.*", "vision.post_norm.*", "vision.proj"),
    losses={"instructions": 1.0},
    mix={"instructions": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.1,
    steps=150,
)


def _monkey(canvas: tuple[int, int]) -> MonkeyConfig:
    return MonkeyConfig(
        vision=VisionConfig(canvas),
        lm=language.QWEN_7B,
        tokens=Tokens(image=151_857, end_of_chunk=151_645, end_of_text=151_643, pad=151_643),
        marks=Marks(image_end=151_858, slot=151_859, turn=151_644, newline=198, assistant=77_091),
        stages=(_INSTRUCTIONS,),
    )


MONKEY = {
    "monkey-7b": _monkey((896, 896)),
    "monkey-7b-1344": _monkey((896, 1344)),
    "monkey-tiny": MonkeyConfig(
        vision=VisionConfig(
            canvas=(64, 64), window=32, patch=8, width=128, layers=2, heads=4, hidden=256, cells=4, grid=4, lm_width=128,
            lm_heads=4,
        ),
        lm=language.TINY_QWEN,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        marks=Marks(image_end=507, slot=508, turn=509, newline=510, assistant=511),  # above what captions need
        stages=(
            _TOWERS,
            _PRETRAIN,
            replace(_INSTRUCTIONS, mix={"instructions": 1.0}, learning_rate=1e-3, warmup=0.1, steps=250),
        ),
    ),
}  # fmt: skip
