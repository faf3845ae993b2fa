"""Every model that can be built by name."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.vision import CLIP_L, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.cogvlm_presets import COGVLM
from mmkernels.models.flamingo import CrossConfig, FlamingoConfig, ResamplerConfig
from mmkernels.models.fuyu_presets import FUYU
from mmkernels.models.lavin_presets import LAVIN
from mmkernels.models.llama_vid_presets import LLAMA_VID
from mmkernels.models.llava_presets import LLAVA
from mmkernels.models.llava_uhd_presets import LLAVA_UHD
from mmkernels.models.moe_llava_presets import MOE_LLAVA
from mmkernels.models.monkey_presets import MONKEY
from mmkernels.models.next_gpt_presets import NEXT_GPT
from mmkernels.models.qformer_presets import QFORMER_MODELS
from mmkernels.models.qwen_presets import QWEN_VL
from mmkernels.models.slime_presets import SLIME
from mmkernels.models.stages import Stage

# the released models add three tokens to the 50,277 of the GPT-NeoX tokenizer and cut the padded tables to them
_GPT_NEOX = Tokens(image=50_278, end_of_chunk=50_277, end_of_text=0, pad=50_279)
_VOCAB = 50_280

_JOINTS = ("resampler.*", "cross.*", "lm.special_rows")
_LOSSES = {"pairs": 0.2, "interleaved": 1.0}

_OPEN_FLAMINGO = Stage(
    "joints",
    trainable=_JOINTS,
    losses=_LOSSES,
    mix={"pairs": 120e6, "interleaved": 60e6},
    learning_rate=1e-4,
    weight_decay={"cross.*": 0.1},
    warmup=1875,
)
_OTTER = Stage(
    "instructions",
    trainable=(*_JOINTS, "lm.embedding.*"),
    losses={"instructions": 1.0},
    mix={"instructions": 1.0},
    learning_rate=1e-5,
    weight_decay={"cross.*": 0.1},
    schedule="cosine",
    warmup=0.01,
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns to name pictures, the language model to write captions
    trainable=("vision.*", "lm.*"),
    losses={"pictures": 1.0, "text": 1.0},
    mix={"pictures": 8.0, "text": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=400,
)


def _flamingo(lm: DecoderConfig, every: int, stage: Stage = _OPEN_FLAMINGO) -> FlamingoConfig:
    return FlamingoConfig(CLIP_L, replace(lm, vocab=_VOCAB), CrossConfig(every), _GPT_NEOX, (stage,))


_TINY = FlamingoConfig(
    vision=VisionConfig(
        image_size=32, patch_size=8, width=128, layers=3, heads=4, hidden=256, activation="gelu"
    ),
    lm=language.TINY,
    cross=CrossConfig(every=2, heads=4, head_dim=32, ff_mult=2),
    tokens=Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
    stages=(_TOWERS, replace(_OPEN_FLAMINGO, learning_rate=4e-3, schedule="cosine", warmup=0.1, steps=350)),
    resampler=ResamplerConfig(depth=2, heads=4, head_dim=32, latents=8, ff_mult=2, max_frames=8),
)
_OTTER_TINY = replace(  # pictures with captions one after another are examples in context
    _OTTER, losses={"interleaved": 1.0}, mix={"interleaved": 1.0}, learning_rate=2e-3, warmup=0.1, steps=350
)

PRESETS = (
    COGVLM
    | FUYU
    | LAVIN
    | LLAMA_VID
    | LLAVA
    | LLAVA_UHD
    | MONKEY
    | SLIME
    | MOE_LLAVA
    | NEXT_GPT
    | QFORMER_MODELS
    | QWEN_VL
    | {
        "flamingo-3b": _flamingo(language.MPT_1B, every=1),
        "flamingo-4b": _flamingo(language.REDPAJAMA_3B, every=2),
        "flamingo-9b": _flamingo(language.MPT_7B, every=4),
        "otter-9b": _flamingo(language.MPT_7B, every=4, stage=_OTTER),
        "flamingo-tiny": _TINY,
        "otter-tiny": replace(_TINY, stages=(_TOWERS, _OTTER_TINY)),
    }
)
