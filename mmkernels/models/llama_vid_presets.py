"""The LLaMA-VID models that can be built by name, and their training recipe."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.qformer_layer import QFormerConfig
from mmkernels.layers.vision import EVA_G, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.llama_vid import ConnectorConfig, LlamaVidConfig, rotary_scaling
from mmkernels.models.stages import Stage

_PROJECTIONS = ("connector.query.*", "connector.key.*", "connector.value.*", "connector.content_*")
_LONGEST = 65_536  # tokens of an hour with subtitles


def _stage(
    name: str, trainable: tuple[str, ...], rate: float, mix: dict[str, float], steps: int | None = None
) -> Stage:
    """Samples of all kinds weigh alike, so a kind's batch weighs what it has of them."""
    total = sum(mix.values())
    losses = {kind: count / total for kind, count in mix.items()}
    return Stage(name, trainable, losses, mix, rate, schedule="cosine", warmup=0.03, steps=steps)


def _stages(videos: bool, long: bool = False) -> tuple[Stage, ...]:
    """The Q-Former comes from InstructBLIP and stays as it is while the projections are aligned; the tower is never trained."""
    captions = {"images": 558e3} | ({"videos": 232e3} if videos else {})
    instructions = {"images": 665e3} | ({"videos": 100e3} if videos else {})
    stages = (
        _stage("alignment", _PROJECTIONS, 1e-3, captions),
        _stage("instruction", ("connector.*", "lm.*"), 2e-5, instructions),
    )
    movies = _stage("long_video", ("lm.*", "connector.content_*"), 2e-5, {"movies": 9e3})
    return (*stages, movies) if long else stages


def _vicuna(model: DecoderConfig) -> DecoderConfig:
    """Version 1.5 is LLaMA 2: twice the positions, another epsilon."""
    return replace(model, block=replace(model.block, eps=1e-5), max_positions=4096)


_7B, _13B = _vicuna(language.LLAMA_7B), _vicuna(language.LLAMA_13B)
_TOKENS = Tokens(image=-200, end_of_chunk=2, end_of_text=2, pad=0)
_LONG = replace(_7B, max_positions=_LONGEST, rotary_scaling=rotary_scaling(_LONGEST, _7B.max_positions))


def _image(lm: DecoderConfig) -> LlamaVidConfig:
    """336 pixels, every patch kept: 577 tokens."""
    tower = replace(EVA_G, image_size=336)
    return LlamaVidConfig(tower, lm, _TOKENS, _stages(videos=False), ConnectorConfig(compress="none"))


def _video(lm: DecoderConfig, *, long: bool = False) -> LlamaVidConfig:
    """224 pixels, one frame a second, two tokens a frame."""
    return LlamaVidConfig(EVA_G, lm, _TOKENS, _stages(videos=True, long=long))


_TINY_LM = DecoderConfig(
    "llama", replace(_7B.block, width=128, heads=4, hidden=344), layers=4, vocab=512, std=0.3
)
_TINY_TOWER = VisionConfig(
    image_size=32, patch_size=8, width=96, layers=2, heads=4, hidden=192, activation="gelu", eps=1e-6, pre_norm=False,
    patch_bias=True, keep_class=True,
)  # fmt: skip
_TINY_QFORMER = QFormerConfig(
    hidden=64, layers=2, heads=4, ffn=128, image_width=96, num_query=8, vocab=512, max_positions=64, dropout=0.0,
    text_head=False,
)  # fmt: skip
_TINY_STAGES = (
    # no published part is this small: first the tower learns to name pictures and the language model to write
    Stage("towers", ("vision.*", "lm.*"), {"pictures": 1.0, "text": 1.0}, {"pictures": 4.0, "text": 1.0}, 2e-3,
          schedule="cosine", warmup=0.2, steps=500),
    _stage("alignment", _PROJECTIONS, 4e-3, {"videos": 1.0}, steps=100),
    _stage("instruction", ("connector.*", "lm.*"), 2e-3, {"videos": 1.0}, steps=700),
)  # fmt: skip

LLAMA_VID = {
    "llama-vid-7b": _video(_7B),
    "llama-vid-13b": _video(_13B),
    "llama-vid-7b-image": _image(_7B),
    "llama-vid-13b-image": _image(_13B),
    "llama-vid-7b-long": _video(_LONG, long=True),
    "llama-vid-tiny": LlamaVidConfig(
        _TINY_TOWER,
        _TINY_LM,
        Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0),
        _TINY_STAGES,
        ConnectorConfig(qformer=_TINY_QFORMER),
        max_prompt=64,
    ),
}
