"""The LLaVA models that can be built by name, and their training recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.vision import CLIP_L, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.llava import LlavaConfig
from mmkernels.models.stages import Stage

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

CLIP_L_224 = replace(CLIP_L, select_layer=-2)
CLIP_L_336 = replace(CLIP_L_224, image_size=336)
CLIP_H_448 = VisionConfig(
    image_size=448, patch_size=14, width=1280, layers=32, heads=16, hidden=5120, activation="gelu", any_size=True,
    select_layer=-2,
)  # fmt: skip


def _read(vision: VisionConfig) -> tuple[str, ...]:
    """Patterns of what of a tower is read: the blocks behind the selected layer never are, and learn nothing."""
    blocks = tuple(f"vision.blocks.{n}.*" for n in range(vision.depth))
    return ("vision.patch.*", "vision.class_token", "vision.positions", "vision.pre_norm.*", *blocks)


def _align(samples: dict[str, float], batch: int, rate: float) -> Stage:
    """The projector alone, on captions."""
    return _stage("align", ("projector.*",), samples, batch, rate)


def _stage(
    name: str, trainable: tuple[str, ...], samples: dict[str, float], batch: int, rate: float, epochs: int = 1
) -> Stage:
    """One epoch or more of all `samples` together, which weigh alike."""
    total = sum(samples.values())
    losses = {kind: count / total for kind, count in samples.items()}
    steps = round(epochs * total / batch)
    return Stage(name, trainable, losses, samples, rate, schedule="cosine", warmup=0.03, steps=steps)


_TEXT = ("projector.*", "lm.*")
_ALIGN = {1: _align({"pairs": 595_375}, 128, 2e-3), 1.5: _align({"pairs": 558_128}, 256, 1e-3)}
_V1 = (_ALIGN[1], _stage("instruct", _TEXT, {"instructions": 157_712}, 128, 2e-5))
_V1_5 = (_ALIGN[1.5], _stage("instruct", _TEXT, {"instructions": 665_298}, 128, 2e-5))
_LLAVAR = (
    _align({"pairs": 595_375, "ocr": 422e3}, 128, 2e-3),
    _stage("instruct", _TEXT, {"instructions": 157_712, "text_rich": 16e3}, 32, 2e-5, epochs=3),
)
_SVIT = (  # the mix of LLaVA-1.5 with the core set in the place of its 150 thousand
    _ALIGN[1.5],
    _stage("instruct", _TEXT, {"svit_core": 157_712, "instructions": 507_586}, 128, 2e-5),
)
_NEXT = (
    _ALIGN[1.5],
    replace(
        _stage("instruct", (*_TEXT, "image_newline", *_read(CLIP_L_336)), {"instructions": 760e3}, 128, 1e-5),
        rates={"vision.*": 0.2},
    ),
)


def _yi(vision: VisionConfig) -> tuple[Stage, ...]:
    """Pairs at 224 pixels, then at 448, tower and projector; at last everything. A source has at most 50,000 of the last."""
    seen = ("projector.*", *_read(vision))
    pairs = replace(
        _stage("pairs", seen, {"pairs": 100e6}, 4096, 1e-4), clip=0.5, image_size=vision.image_size // 2
    )
    larger = replace(_stage("larger", seen, {"pairs": 25e6}, 4096, 1e-4), clip=0.5)
    last = _stage("instruct", (*seen, "lm.*"), {"instructions": 1e6}, 256, 2e-5, epochs=2)
    return pairs, larger, last


_TOKENS = Tokens(image=-200, end_of_chunk=2, end_of_text=2, pad=0)


def _v1_5(lm: DecoderConfig, stages: tuple[Stage, ...] = _V1_5) -> LlavaConfig:
    return LlavaConfig(CLIP_L_336, lm, _TOKENS, stages)


def _next(lm: DecoderConfig, tokens: Tokens = _TOKENS) -> LlavaConfig:
    return LlavaConfig(CLIP_L_336, lm, tokens, _NEXT, aspect="anyres", pinpoints=PINPOINTS)


def _yi_vl(lm: DecoderConfig) -> LlavaConfig:
    return LlavaConfig(CLIP_H_448, lm, _TOKENS, _yi(CLIP_H_448), projector="mlp2x_gelu_norm", template="yi")


def _v1(lm: DecoderConfig) -> LlavaConfig:
    return LlavaConfig(CLIP_L_224, lm, _TOKENS, _V1, projector="linear", aspect="square")


_TINY_LM = DecoderConfig(
    "llama", replace(language.LLAMA2_7B.block, width=128, heads=4, hidden=256), layers=4, vocab=512, std=0.3
)
_TINY_TOWER = VisionConfig(
    image_size=32, patch_size=8, width=96, layers=4, heads=4, hidden=192, activation="gelu", select_layer=-2
)
_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns what is where, the language model to tell what it is shown
    trainable=(*_read(_TINY_TOWER), "lm.*"),
    losses={"patches": 1.0, "echoes": 1.0},
    mix={"patches": 2.0, "echoes": 1.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.1,
    steps=700,
    betas=(0.9, 0.98),
)


def _small(stage: Stage, rate: float, steps: int, size: int | None = None) -> Stage:
    """A published stage with what it freezes, at the length and rate of a model that is no larger than a test."""
    kinds = {kind if kind in ("pairs", "instructions") else "instructions" for kind in stage.losses}
    even = dict.fromkeys(sorted(kinds), 1.0)
    return replace(
        stage,
        losses=even,
        mix=even,
        learning_rate=rate,
        steps=steps,
        warmup=0.1,
        image_size=size,
        betas=(0.9, 0.98),
    )


def _tiny(config: LlavaConfig, stages: tuple[Stage, ...], **changes: Any) -> LlavaConfig:
    """A published model's ways at the size of a test."""
    tokens = Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0)
    tiny = {"vision": _TINY_TOWER, "lm": _TINY_LM, "tokens": tokens, "template": "short", **changes}
    return replace(config, **tiny, stages=(_TOWERS, *stages))


def _tiny_stages(recipe: tuple[Stage, ...], *changes: Any) -> tuple[Stage, ...]:
    return tuple(_small(stage, *change) for stage, change in zip(recipe, changes, strict=True))


_TINY_NEXT = (_NEXT[0], replace(_NEXT[1], trainable=(*_TEXT, "image_newline", *_read(_TINY_TOWER))))
_TINY_H = replace(_TINY_TOWER, image_size=48, any_size=True)

LLAVA = {
    "llava-7b": _v1(language.LLAMA_7B),
    "llava-13b": _v1(language.LLAMA_13B),
    "llava-1.5-7b": _v1_5(language.LLAMA2_7B),
    "llava-1.5-13b": _v1_5(language.LLAMA2_13B),
    "llava-next-7b": _next(language.MISTRAL_7B),
    "llava-next-vicuna-7b": _next(language.LLAMA2_7B),
    "llava-next-13b": _next(language.LLAMA2_13B),
    "llava-next-34b": _next(language.YI_34B, replace(_TOKENS, end_of_chunk=7)),
    "llavar-13b": LlavaConfig(  # the image's places have a row in the embedding, and so have what begins and ends them
        CLIP_L_336,
        replace(language.LLAMA_13B, vocab=32_003),
        replace(_TOKENS, image=32_000),
        _LLAVAR,
        projector="linear",
        marks=(32_001, 32_002),
    ),
    "svit-13b": _v1_5(language.LLAMA2_13B, _SVIT),
    "yi-vl-6b": _yi_vl(language.YI_6B),
    "yi-vl-34b": _yi_vl(language.YI_34B),
    "llava-tiny": _tiny(_v1(language.LLAMA_7B), _tiny_stages(_V1, (2e-3, 100), (2e-3, 400))),
    "llava-1.5-tiny": _tiny(_v1_5(language.LLAMA2_7B), _tiny_stages(_V1_5, (2e-3, 100), (2e-3, 400))),
    "llava-next-tiny": _tiny(
        _next(language.LLAMA2_7B),
        _tiny_stages(_TINY_NEXT, (2e-3, 100), (2e-3, 400)),
        pinpoints=tuple((w * 32 // 336, h * 32 // 336) for w, h in PINPOINTS),
    ),
    "yi-vl-tiny": _tiny(
        _yi_vl(language.YI_6B),
        _tiny_stages(_yi(_TINY_H), (1e-3, 100, 24), (1e-3, 100), (2e-3, 400)),
        vision=_TINY_H,
    ),
}
