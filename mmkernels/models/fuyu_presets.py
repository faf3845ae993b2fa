"""Fuyu and OtterHD by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.fuyu import FuyuConfig
from mmkernels.models.stages import Stage

_INSTRUCTIONS = Stage(
    "instructions",  # nothing is frozen: there is no tower that could be
    trainable=("*",),
    losses={"instructions": 1.0},
    mix={"instructions": 1.0},
    learning_rate=1e-5,
    weight_decay={"*": 0.1},
)


def _fuyu(lm: DecoderConfig) -> FuyuConfig:
    tokens = Tokens(image=71_011, end_of_chunk=71_122, end_of_text=2, pad=0)
    return FuyuConfig(
        30, (1920, 1080), lm, tokens, newline=71_019, begin=1, answer=71_122, stages=(_INSTRUCTIONS,)
    )


_PERSIMMON = replace(language.PERSIMMON_8B, max_positions=16_384)
_TINY_LM = replace(
    _PERSIMMON, block=replace(_PERSIMMON.block, width=128, heads=4, hidden=512), layers=4, vocab=512, std=0.3
)

FUYU = {
    "fuyu-8b": _fuyu(_PERSIMMON),
    "otterhd-8b": _fuyu(_PERSIMMON),
    "fuyu-tiny": FuyuConfig(
        patch=8,
        canvas=(128, 128),
        lm=_TINY_LM,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        newline=510,
        begin=509,
        answer=511,  # above what texts need
        stages=(replace(_INSTRUCTIONS, learning_rate=2e-3, schedule="cosine", warmup=0.1, steps=800),),
    ),
}
