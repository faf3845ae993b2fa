"""The NExT-GPT models that can be built by name, and their training recipe."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from mmkernels.layers.decoder import BlockConfig, DecoderConfig
from mmkernels.layers.lora import LoraConfig
from mmkernels.layers.vision import VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.next_gpt_config import GroupingConfig, NextGptConfig, Signal
from mmkernels.models.next_gpt_parts import MakerConfig
from mmkernels.models.stages import Stage

_COUNTS = (4, 24, 8)  # signal tokens of image, video, audio
_VISION = VisionConfig(
    image_size=224, patch_size=14, width=1280, layers=32, heads=16, hidden=5120, activation="gelu", eps=1e-6
)
_AUDIO = VisionConfig(
    image_size=192,
    patch_size=16,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    activation="gelu",
    eps=1e-6,
    pre_norm=False,
)


def _stage(name: str, trainable: tuple[str, ...], rate: float, warmup: float) -> Stage:
    """A stage on samples of its own name."""
    return Stage(name, trainable, {name: 1.0}, {name: 1.0}, rate, schedule="cosine", warmup=warmup)


def _stages(warmup: float) -> tuple[Stage, ...]:
    last = _stage("instructions", ("lm.blocks.*.lora_*", "project.*", "out.*"), 2e-4, warmup)
    return (
        _stage("encoding", ("project.*",), 1e-3, warmup),
        _stage("decoding", ("out.*", "lm.embedding.*"), 2e-4, warmup),
        replace(last, rates={"project.*": 0.1, "out.*": 0.1}),
    )


def _signals(
    first: int, widths: tuple[int, int, int], stride: int, video: float = 1.0
) -> tuple[Signal, Signal, Signal]:
    """Signal tokens one after another from id `first`; places are below 0, where no embedding is."""
    starts = [first, *accumulate(_COUNTS, initial=first)][1:]
    made = [
        Signal(
            -200 - n,
            tuple(range(start, start + count)),
            1 if n == 2 else 77,
            width,
            video if n == 1 else 1.0,
            stride,
        )
        for n, (start, count, width) in enumerate(zip(starts, _COUNTS, widths, strict=False))
    ]
    return made[0], made[1], made[2]


_TOKENS = Tokens(image=-200, end_of_chunk=835, end_of_text=2, pad=2)  # "###" ends a turn
# the first release: Vicuna 0 with <Img>, </Img> and the signals; the second: Vicuna 1.5 with the signals
_V0 = replace(language.LLAMA_7B, vocab=32_000 + 2 + sum(_COUNTS))
_V15 = replace(language.LLAMA2_7B, vocab=32_000 + sum(_COUNTS), max_positions=4096)

_TINY_LM = DecoderConfig(
    "llama",
    BlockConfig(
        128, 4, 256, activation="swiglu", norm="rms", eps=1e-6, qkv_bias=False, out_bias=False, mlp_bias=False
    ),
    layers=4,
    vocab=512,
    tied=True,
    std=0.3,
)
_TINY_TOWER = VisionConfig(
    image_size=32, patch_size=8, width=128, layers=3, heads=4, hidden=256, activation="gelu", eps=1e-6
)
_TOWERS = Stage(
    "towers",  # no published part is this small: encoders learn to name what they see and hear, the language model to write
    trainable=(
        "vision.*",
        "audio.*",
        "lm.embedding.*",
        "lm.norm.*",
        "lm.blocks.*_norm.*",
        "lm.blocks.*weight",
        "makers.*",
    ),
    losses={"inputs": 1.0, "echoes": 1.0, "makers": 1.0},
    mix={"inputs": 4.0, "echoes": 1.0, "makers": 3.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.1,
    steps=600,
)


def _tiny(stage: Stage, rate: float, steps: int) -> Stage:
    return replace(stage, learning_rate=rate, warmup=0.1, steps=steps, rates={})


NEXT_GPT = {
    "next_gpt-7b": NextGptConfig(
        _VISION, _AUDIO, _V15, _TOKENS, 1, _signals(32_000, (1024, 1024, 512), stride=2), _stages(0.03),
        lora=LoraConfig(128, 256, 0.05, ("q", "k", "v", "out", "up", "down")),
    ),
    "next_gpt-7b-v0": NextGptConfig(
        _VISION, _AUDIO, _V0, _TOKENS, 1, _signals(32_002, (768, 1024, 512), stride=1, video=2.0), _stages(0.1),
        grouping=None, lora=LoraConfig(32, 32, 0.1, ("q", "k", "v", "out")), init="normal",
    ),
    "next_gpt-tiny": NextGptConfig(
        _TINY_TOWER,
        replace(_TINY_TOWER, layers=2),
        _TINY_LM,
        Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        1,
        (
            Signal(2, (495, 496, 497, 498), 8, 64, maker=MakerConfig((3, 32, 32), 8)),
            Signal(493, (499, 500, 501, 502, 503, 504), 8, 48, maker=MakerConfig((4, 3, 16, 16), 8)),
            Signal(494, (505, 506, 507), 1, 32, maker=MakerConfig((1024,), 64)),
        ),
        (
            _TOWERS, *(_tiny(stage, rate, steps) for stage, rate, steps in
                       zip(_stages(0.1), (4e-3, 2e-3, 2e-3), (300, 300, 400), strict=True)),
        ),
        joint=64,
        grouping=GroupingConfig(64, 4, (1, 1, 1), (16, 8, 0), (16, 8)),
        lora=LoraConfig(8, 16, 0.0, ("q", "k", "v", "out")),
        hidden=64,
        layers=2,
        init="normal",
    ),
}  # fmt: skip
