"""BLIP-2, InstructBLIP and InternLM-XComposer in their published sizes, and small ones that train from nothing."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.lora import LoraConfig
from mmkernels.layers.qformer_layer import QFormerConfig
from mmkernels.layers.t5 import T5Config
from mmkernels.layers.vision import EVA_G, VisionConfig
from mmkernels.models import language
from mmkernels.models.base import Tokens
from mmkernels.models.qformer import Blip2Config
from mmkernels.models.qformer_recipes import COCO_CAPTIONS, INSTRUCT, STAGE1, STAGE2
from mmkernels.models.qformer_seq2seq import Blip2Seq2SeqConfig
from mmkernels.models.qformer_stage1 import HeadsConfig
from mmkernels.models.stages import Stage

# ids that the tokenizers never give stand for the places of media; OPT's texts end with a newline
_OPT = Tokens(image=50_271, end_of_chunk=50_118, end_of_text=2, pad=1)
_VICUNA = Tokens(image=0, end_of_chunk=2, end_of_text=2, pad=32_000)
_FLAN_T5 = Tokens(image=32_100, end_of_chunk=1, end_of_text=1, pad=0)
_INTERNLM = Tokens(image=103_167, end_of_chunk=103_028, end_of_text=2, pad=0)

_SAMPLER = ("qformer.*", "proj.*")
_XCOMPOSER = Stage(
    "pretrain",  # the language model itself; its updates of low rank only learn from instructions
    trainable=(
        *_SAMPLER,
        "lm.blocks.*.weight",
        "lm.blocks.*.bias",
        "lm.norm.*",
        "lm.embedding.*",
        "lm.head.*",
    ),
    losses={"interleaved": 1.0},
    mix={"interleaved": 1.0},
    learning_rate=1e-5,
    weight_decay={"*": 0.1},
    betas=(0.9, 0.95),
    schedule="cosine",
    warmup=0.01,
)
_XCOMPOSER_SFT = replace(
    _XCOMPOSER,
    name="instructions",
    trainable=(*_SAMPLER, "lm.blocks.*.lora_*"),
    losses={"instructions": 1.0},
    mix={"instructions": 1.0},
)
_XCOMPOSER_LORA = LoraConfig(rank=256, alpha=256, dropout=0.05)

VICUNA_7B = replace(language.LLAMA_7B, vocab=32_001)
VICUNA_13B = replace(language.LLAMA_13B, vocab=32_001)
INTERNLM_7B = replace(
    language.LLAMA_7B,
    vocab=103_168,
    block=replace(language.LLAMA_7B.block, eps=1e-5, qkv_bias=True, out_bias=True),
)
QUERIES = QFormerConfig(vocab=0)  # what stage 2 keeps
READERS = QFormerConfig(text_head=False)  # of instructions


_EVA_364 = replace(EVA_G, image_size=364)  # 677 tokens


def _blip2(lm: DecoderConfig, *, coco: bool = False) -> Blip2Config:
    tower, stage = (_EVA_364, COCO_CAPTIONS) if coco else (EVA_G, STAGE2)
    return Blip2Config(tower, QUERIES, lm, _OPT, (stage,))


def _instruct(lm: DecoderConfig) -> Blip2Config:
    return Blip2Config(EVA_G, READERS, lm, _VICUNA, (INSTRUCT,), instruct=True)


def _blip2_t5(lm: T5Config, *, coco: bool = False) -> Blip2Seq2SeqConfig:
    tower, stage = (_EVA_364, COCO_CAPTIONS) if coco else (EVA_G, STAGE2)
    return Blip2Seq2SeqConfig(tower, QUERIES, lm, _FLAN_T5, (stage,))


def _instruct_t5(lm: T5Config) -> Blip2Seq2SeqConfig:
    return Blip2Seq2SeqConfig(EVA_G, READERS, lm, _FLAN_T5, (INSTRUCT,), instruct=True)


_TINY = Tokens(image=2, end_of_chunk=3, end_of_text=1, pad=0)
_TINY_VISION = VisionConfig(
    image_size=32, patch_size=8, width=128, layers=2, heads=4, hidden=256, activation="gelu", eps=1e-6, pre_norm=False,
    patch_bias=True, keep_class=True,
)  # fmt: skip
# one id more than the tokenizer's: [DEC], which begins a text to write
_TINY_QFORMER = QFormerConfig(
    hidden=96,
    layers=4,
    heads=4,
    ffn=192,
    image_width=128,
    num_query=8,
    vocab=513,
    max_positions=32,
    dropout=0.0,
    std=0.06,
)  # narrow: matrices of the published 0.02 would hardly let the image through
_TINY_OPT = replace(
    language.OPT_2_7B,
    block=replace(language.OPT_2_7B.block, width=128, heads=4, hidden=256),
    layers=3,
    vocab=512,
    max_positions=288,
    std=0.3,
)
_TINY_INTERNLM = replace(
    INTERNLM_7B,
    block=replace(INTERNLM_7B.block, width=128, heads=4, hidden=256),
    layers=3,
    vocab=512,
    std=0.3,
)
_TINY_LLAMA = replace(_TINY_INTERNLM, block=replace(_TINY_INTERNLM.block, qkv_bias=False, out_bias=False))
_TINY_T5 = T5Config(128, 32, 4, 256, layers=2, decoder_layers=2, vocab=512)
_TOWERS = Stage(
    "towers",  # no published part is this small: the tower learns to name pictures, the language model to write what it is told
    trainable=("vision.*", "lm.embedding.*", "lm.position_embedding.*", "lm.blocks.*", "lm.norm.*"),
    losses={"pictures": 1.0, "echo": 1.0},
    mix={"pictures": 4.0, "echo": 2.0},
    learning_rate=2e-3,
    schedule="cosine",
    warmup=0.2,
    steps=500,
)
_ROTARY_TOWERS = replace(
    _TOWERS, trainable=("vision.*", "lm.embedding.*", "lm.blocks.*", "lm.norm.*", "lm.head.*")
)
_T5_TOWERS = replace(_TOWERS, trainable=("vision.*", "lm.*"))
_TINY_STAGE1 = replace(STAGE1, learning_rate=2e-3, warmup=0.1, steps=400)
_TINY_STAGE2 = replace(STAGE2, learning_rate=2e-3, floor=1e-4, warmup=0.1, steps=350)
_TINY_INSTRUCT = replace(INSTRUCT, learning_rate=2e-3, warmup=0.1, steps=300)
_TINY_XCOMPOSER = replace(
    _XCOMPOSER, losses={"captions": 1.0}, mix={"captions": 1.0}, learning_rate=2e-3, warmup=0.1, steps=300
)
_TINY_XCOMPOSER_SFT = replace(
    _TINY_XCOMPOSER, name="instructions", trainable=_XCOMPOSER_SFT.trainable, learning_rate=1e-3, steps=100
)

QFORMER_MODELS = {
    "blip2-opt-2.7b": _blip2(language.OPT_2_7B),
    "blip2-opt-6.7b": _blip2(language.OPT_6_7B),
    "blip2-flan-t5-xl": _blip2_t5(language.FLAN_T5_XL),
    "blip2-flan-t5-xxl": _blip2_t5(language.FLAN_T5_XXL),
    "blip2-opt-2.7b-coco": _blip2(language.OPT_2_7B, coco=True),
    "blip2-opt-6.7b-coco": _blip2(language.OPT_6_7B, coco=True),
    "blip2-flan-t5-xl-coco": _blip2_t5(language.FLAN_T5_XL, coco=True),
    "instructblip-flan-t5-xl": _instruct_t5(language.FLAN_T5_XL),
    "instructblip-flan-t5-xxl": _instruct_t5(language.FLAN_T5_XXL),
    "instructblip-vicuna-7b": _instruct(VICUNA_7B),
    "instructblip-vicuna-13b": _instruct(VICUNA_13B),
    "xcomposer-7b": Blip2Config(
        EVA_G, replace(QUERIES, num_query=64), INTERNLM_7B, _INTERNLM, (_XCOMPOSER, _XCOMPOSER_SFT), flags=True,
        wide_norm=False, lora=_XCOMPOSER_LORA,
    ),
    "blip2-tiny": Blip2Config(
        _TINY_VISION, _TINY_QFORMER, _TINY_OPT, _TINY, (_TOWERS, _TINY_STAGE1, _TINY_STAGE2),
        heads=HeadsConfig(embed=64, bos=512),
    ),
    "blip2-t5-tiny": Blip2Seq2SeqConfig(
        _TINY_VISION, _TINY_QFORMER, _TINY_T5, _TINY, (_T5_TOWERS, _TINY_STAGE1, _TINY_STAGE2),
        heads=HeadsConfig(embed=64, bos=512),
    ),
    "instructblip-tiny": Blip2Config(
        _TINY_VISION, replace(_TINY_QFORMER, text_head=False), _TINY_LLAMA, _TINY, (_ROTARY_TOWERS, _TINY_INSTRUCT),
        instruct=True,
    ),
    "xcomposer-tiny": Blip2Config(
        _TINY_VISION, replace(_TINY_QFORMER, vocab=0, num_query=12), _TINY_INTERNLM, _TINY,
        (_ROTARY_TOWERS, _TINY_XCOMPOSER, _TINY_XCOMPOSER_SFT),
        flags=True, wide_norm=False, lora=LoraConfig(rank=8, alpha=8),
    ),
}  # fmt: skip
