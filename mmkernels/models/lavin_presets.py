"""LaVIN by name."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.modality_adapter import AdapterConfig
from mmkernels.layers.vision import CLIP_L, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.lavin import LavinConfig
from mmkernels.models.lavin_text import Marks
from mmkernels.models.stages import Stage

_ADAPTERS = ("*adapter*",)
_BATCH = 32  # ScienceQA's
_MIXTURE = Stage(
    "mixture",  # one stage, end to end: samples with a picture and without one in the same batch
    trainable=_ADAPTERS,
    losses={"mixture": 1.0},
    mix={"mixture": 1.0},
    learning_rate=9e-3 * _BATCH / 256,
    weight_decay={"*bias": 0.0, "*": 0.02},
    schedule="cosine",
    warmup=2 / 20,
    clip=math.inf,
    betas=(0.9, 0.95),
    decay_vectors=False,
)
# LLaMA's ids of <s> and of "Image: " and "Image: N/A"; the two places have no row in its embedding
_TOKENS = Tokens(image=-200, end_of_chunk=2, end_of_text=2, pad=0)
_MARKS = Marks(
    modality=-201, bos=1, image_prefix=(7084, 29901, 29871), text_prefix=(7084, 29901, 405, 29914, 29909)
)


def _lavin(lm: DecoderConfig, temperature: float = 10.0) -> LavinConfig:
    adapter = AdapterConfig(temperature=temperature, router_dtype=torch.float16)
    seeing = replace(adapter, reads="token")
    return LavinConfig(
        vision=replace(CLIP_L, adapter=seeing, class_every=4),
        lm=replace(lm, block=replace(lm.block, adapter=adapter)),
        tokens=_TOKENS,
        marks=_MARKS,
        stages=(_MIXTURE,),
        visual_dtype=torch.float16,
    )


_TINY_ADAPTER = AdapterConfig()
_TINY_LM = replace(
    language.LLAMA_7B,
    block=replace(language.LLAMA_7B.block, width=128, heads=4, hidden=256, adapter=_TINY_ADAPTER),
    layers=4,
    vocab=512,
    std=0.3,
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns to name pictures, the language model to write what it reads
    trainable=(
        "vision.patch.*", "vision.class_token", "vision.positions", "vision.pre_norm.*", "vision.blocks.*.attention*",
        "vision.blocks.*.mlp*", "lm.embedding.*", "lm.blocks.*.attention*", "lm.blocks.*.mlp*", "lm.norm.*", "lm.head.*",
    ),
    losses={"pictures": 1.0, "echoes": 1.0, "text": 1.0},
    mix={"pictures": 4.0, "echoes": 1.0, "text": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=400,
)  # fmt: skip

LAVIN = {
    "lavin-7b": _lavin(language.LLAMA_7B),
    "lavin-13b": _lavin(language.LLAMA_13B),
    "lavin-13b-chat": _lavin(language.LLAMA_13B, temperature=5.0),
    "lavin-tiny": LavinConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=128, layers=4, heads=4, hidden=256, activation="gelu",
            adapter=replace(_TINY_ADAPTER, reads="token"), class_every=1,
        ),
        lm=_TINY_LM,
        tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        marks=Marks(modality=508, bos=1, image_prefix=(509, 510), text_prefix=(509, 511)),  # above what captions need
        stages=(_TOWERS, replace(_MIXTURE, learning_rate=4e-3, clip=1.0, steps=600)),
        hidden=64,
    ),
}  # fmt: skip
