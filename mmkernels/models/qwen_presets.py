"""Qwen-VL by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.vision import VIT_BIGG, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.qwen_text import Marks
from mmkernels.models.qwen_vl import QwenVLConfig
from mmkernels.models.stages import Stage

_TASKS = {  # samples of the second stage, in millions
    "caption": 19.7, "vqa": 3.6, "grounding": 3.5, "ref_grounding": 8.7, "grounded_caption": 8.7, "ocr": 24.8, "text": 7.8,
}  # fmt: skip
_PRETRAIN = Stage(
    "pretrain",
    trainable=("vision.*",),
    losses={"pairs": 1.0},
    mix={"pairs": 1.4e9},
    learning_rate=2e-4,
    schedule="cosine",
    steps=50_000,
    image_size=224,
)
_MULTITASK = Stage(
    "multitask",  # tasks are packed into one stream: each weighs what it has of it
    trainable=("vision.*", "lm.*"),
    losses={task: samples / sum(_TASKS.values()) for task, samples in _TASKS.items()},
    mix=_TASKS,
    learning_rate=5e-5,
    schedule="cosine",
    steps=19_000,
    image_size=448,
)
_CHAT = Stage(
    "chat",  # the published switch freezes all of the vision side but its resampler: norm and projection too
    trainable=("lm.*", "vision.resampler.*"),
    losses={"instructions": 1.0},
    mix={"instructions": 350e3},
    learning_rate=1e-5,
    weight_decay={"*norm.weight": 0.0, "*.weight": 0.1},
    betas=(0.9, 0.95),
    schedule="cosine",
    warmup=0.01,
    steps=8_000,
    image_size=448,
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns to name pictures, the language model to write what it sees
    trainable=("vision.tower.*", "lm.*"),
    losses={"pictures": 1.0, "echoes": 1.0},
    mix={"pictures": 2.0, "echoes": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=500,
)


def _small(stage: Stage, losses: dict[str, float], rate: float, steps: int, side: int) -> Stage:
    """A published stage with what it freezes, at the length and rate of a model that is no larger than a test."""
    changes = {"learning_rate": rate, "steps": steps, "image_size": side, "warmup": 0.1}
    return replace(stage, losses=losses, mix=dict.fromkeys(losses, 1.0), **changes)


QWEN_VL = {
    "qwen-vl-7b": QwenVLConfig(
        vision=VIT_BIGG,
        grid=16,
        heads=32,
        lm=language.QWEN_7B,
        tokens=Tokens(image=151_857, end_of_chunk=151_645, end_of_text=151_643, pad=151_643),
        marks=Marks(image_end=151_858, slot=151_859, turn=151_644, newline=198, assistant=77_091),
        stages=(_PRETRAIN, _MULTITASK, _CHAT),
    ),
    "qwen_vl-tiny": QwenVLConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=128, layers=2, heads=4, hidden=256, activation="gelu", eps=1e-6,
            class_token=False, any_size=True,
        ),
        grid=4,
        heads=4,
        lm=language.TINY_QWEN,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        marks=Marks(image_end=507, slot=508, turn=509, newline=510, assistant=511),  # above what captions need
        stages=(
            _TOWERS,
            _small(_PRETRAIN, {"pairs": 1.0}, 2e-3, 500, 32),
            _small(_MULTITASK, {"pairs": 1.0, "interleaved": 1.0}, 1e-3, 150, 64),
            _small(_CHAT, {"instructions": 1.0}, 5e-4, 150, 64),
        ),
    ),
}  # fmt: skip
