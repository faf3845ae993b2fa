"""Whole models, built by name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator

import torch

from mmkernels.models.base import Cache as Cache
from mmkernels.models.base import MultimodalModel as MultimodalModel
from mmkernels.models.base import Output as Output
from mmkernels.models.base import Tokens as Tokens
from mmkernels.models.cogvlm import CogVLM as CogVLM
from mmkernels.models.cogvlm import CogVLMConfig as CogVLMConfig
from mmkernels.models.decoding import Decoding as Decoding
from mmkernels.models.flamingo import Flamingo as Flamingo
from mmkernels.models.flamingo import FlamingoConfig as FlamingoConfig
from mmkernels.models.flamingo import flamingo_labels as flamingo_labels
from mmkernels.models.fuyu import Fuyu as Fuyu
from mmkernels.models.fuyu import FuyuConfig as FuyuConfig
from mmkernels.models.lavin import Lavin as Lavin
from mmkernels.models.lavin import LavinConfig as LavinConfig
from mmkernels.models.llama_vid import LlamaVid as LlamaVid
from mmkernels.models.llama_vid import LlamaVidConfig as LlamaVidConfig
from mmkernels.models.llava import Llava as Llava
from mmkernels.models.llava import LlavaConfig as LlavaConfig
from mmkernels.models.llava_uhd import LlavaUHD as LlavaUHD
from mmkernels.models.llava_uhd import LlavaUHDConfig as LlavaUHDConfig
from mmkernels.models.moe_llava import MoeLlava as MoeLlava
from mmkernels.models.moe_llava import MoeLlavaConfig as MoeLlavaConfig
from mmkernels.models.monkey import Monkey as Monkey
from mmkernels.models.monkey import MonkeyConfig as MonkeyConfig
from mmkernels.models.next_gpt import NextGpt as NextGpt
from mmkernels.models.next_gpt import NextGptConfig as NextGptConfig
from mmkernels.models.presets import PRESETS as _PRESETS
from mmkernels.models.qformer import Blip2 as Blip2
from mmkernels.models.qformer import Blip2Config as Blip2Config
from mmkernels.models.qformer import rank_candidates as rank_candidates
from mmkernels.models.qformer_seq2seq import Blip2Seq2Seq as Blip2Seq2Seq
from mmkernels.models.qformer_seq2seq import Blip2Seq2SeqConfig as Blip2Seq2SeqConfig
from mmkernels.models.qwen_vl import QwenVL as QwenVL
from mmkernels.models.qwen_vl import QwenVLConfig as QwenVLConfig
from mmkernels.models.slime import Slime as Slime
from mmkernels.models.slime import SlimeConfig as SlimeConfig
from mmkernels.models.stages import Stage as Stage

Config = (
    Blip2Config
    | Blip2Seq2SeqConfig
    | CogVLMConfig
    | FlamingoConfig
    | FuyuConfig
    | LavinConfig
    | LlamaVidConfig
    | MoeLlavaConfig
    | LlavaConfig
    | LlavaUHDConfig
    | MonkeyConfig
    | NextGptConfig
    | QwenVLConfig
    | SlimeConfig
)
_FAMILIES = {
    CogVLMConfig: CogVLM,
    FlamingoConfig: Flamingo,
    FuyuConfig: Fuyu,
    LavinConfig: Lavin,
    LlamaVidConfig: LlamaVid,
    MoeLlavaConfig: MoeLlava,
    LlavaConfig: Llava,
    NextGptConfig: NextGpt,
    Blip2Config: Blip2,
    Blip2Seq2SeqConfig: Blip2Seq2Seq,
    LlavaUHDConfig: LlavaUHD,
    MonkeyConfig: Monkey,
    QwenVLConfig: QwenVL,
    SlimeConfig: Slime,
}


def list() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(sorted(_PRESETS))


def config(name: str) -> Config:
    """The frozen config behind a name; change it with `dataclasses.replace` and give it to `build`."""
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(_PRESETS))}"
        raise ValueError(f"name: got {name!r}, no such model; {hint}")
    return _PRESETS[name]


def build(
    name: str | Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> MultimodalModel:
    """A model with fresh parameters, from a preset's name or a config; on `torch.device("meta")` it costs no memory."""
    chosen = config(name) if isinstance(name, str) else name
    with _default_dtype(dtype), torch.device(torch.get_default_device() if device is None else device):
        return _FAMILIES[type(chosen)](chosen)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
