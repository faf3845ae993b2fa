"""What training must know of a family of models: its batches, its losses, and what is measured when a stage ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mmkernels import models
from mmkernels.data import Dataset, Pairs, Sequences, Tokenizer, Videos
from mmkernels.models import (
    Blip2Config,
    Blip2Seq2SeqConfig,
    CogVLMConfig,
    FlamingoConfig,
    FuyuConfig,
    LavinConfig,
    LlamaVidConfig,
    LlavaConfig,
    LlavaUHDConfig,
    MoeLlavaConfig,
    MonkeyConfig,
    NextGptConfig,
    QwenVLConfig,
    SlimeConfig,
    Stage,
)
from mmkernels.train import cogvlm, lavin, llava, moe_llava, next_gpt, qformer, qwen, seq2seq, sliced, video
from mmkernels.train.objectives import Objectives


def _nothing(model: Any, sequences: Any, stage: Stage) -> dict[str, Any]:
    return {}


def _vocabulary(config: Any) -> int:
    return config.lm.vocab


def _captions(dataset: Dataset, config: Any) -> Iterable[str]:
    return dataset.captions


@dataclass(frozen=True)
class Family:
    """`measure(model, sequences, stage)` gives the figures that go to the log with a stage's last step; the tokenizer is made
    of `texts(dataset, config)` and has at most `words(config)` tokens.
    """

    sequences: Callable[[Dataset, Tokenizer, Any, int], Sequences]
    objectives: type[Objectives] = Objectives
    measure: Callable[[Any, Any, Stage], dict[str, Any]] = _nothing
    texts: Callable[[Dataset, Any], Iterable[str]] = _captions
    words: Callable[[Any], int] = _vocabulary


def _sequences(dataset: Dataset, tokenizer: Tokenizer, config: Any, seed: int) -> Sequences:
    return Sequences(dataset, tokenizer, config.vision.image_size, seed=seed)


def _pairs(dataset: Dataset, tokenizer: Tokenizer, config: Blip2Config, seed: int) -> Pairs:
    return Pairs(
        dataset,
        tokenizer,
        config.vision.image_size,
        seed=seed,
        places=config.image_tokens,
        asks=config.instruct,
    )


def _videos(dataset: Dataset, tokenizer: Tokenizer, config: LlamaVidConfig, seed: int) -> Videos:
    size, places = config.vision.image_size, config.tokens_per_frame
    return Videos(dataset, tokenizer, size, seed=seed, tokens_per_frame=places)


_SLICED = Family(sliced.pictures, sliced.SlicedObjectives, sliced.measure, sliced.texts, sliced.words)
_FAMILIES = {
    **dict.fromkeys((FuyuConfig, LlavaUHDConfig, MonkeyConfig, SlimeConfig), _SLICED),
    CogVLMConfig: Family(cogvlm.grounding, cogvlm.CogVLMObjectives, cogvlm.measure, cogvlm.texts),
    FlamingoConfig: Family(_sequences),
    Blip2Config: Family(_pairs, qformer.QFormerObjectives, qformer.measure),
    Blip2Seq2SeqConfig: Family(_pairs, seq2seq.Seq2SeqObjectives, qformer.measure),
    LavinConfig: Family(lavin.mixtures, lavin.LavinObjectives, lavin.measure),
    LlamaVidConfig: Family(_videos, video.VideoObjectives, video.measure),
    LlavaConfig: Family(llava.readings, llava.LlavaObjectives, llava.measure, llava.texts),
    MoeLlavaConfig: Family(
        moe_llava.photographs, moe_llava.MoeLlavaObjectives, moe_llava.measure, llava.texts
    ),
    NextGptConfig: Family(
        next_gpt.switching, next_gpt.NextGptObjectives, next_gpt.measure, next_gpt.texts, next_gpt.words
    ),
    QwenVLConfig: Family(qwen.dialogues, qwen.QwenObjectives, words=qwen.words),
}


def known(model: str) -> bool:
    """Whether the training loop knows the model's family."""
    return type(models.config(model)) in _FAMILIES


def family(config: Any) -> Family:
    return _FAMILIES[type(config)]
