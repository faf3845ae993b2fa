"""The language models under the families, as configs of the one decoder and of T5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmkernels.layers.decoder import BlockConfig, DecoderConfig
from mmkernels.layers.t5 import T5Config


def _mpt(width: int, heads: int, layers: int, qk_norm: str | None = None) -> DecoderConfig:
    """MosaicML's MPT: ALiBi, no biases anywhere, the head is the embedding."""
    block = BlockConfig(
        width,
        heads,
        4 * width,
        norm_bias=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=qk_norm,
    )
    return DecoderConfig("mpt", block, layers, vocab=50_432, positions="alibi", tied=True)


def _opt(width: int, heads: int, layers: int) -> DecoderConfig:
    """Meta's OPT: learned positions whose first two rows are never read, ReLU, biases, the head is the embedding."""
    return DecoderConfig(
        "opt",
        BlockConfig(width, heads, 4 * width, activation="relu"),
        layers,
        vocab=50_272,
        positions="learned",
        position_offset=2,
        tied=True,
    )


def _llama(
    width: int,
    heads: int,
    layers: int,
    hidden: int,
    *,
    vocab: int = 32_000,
    base: float = 10_000.0,
    **block: Any,
) -> DecoderConfig:
    """Meta's LLaMA and what is built like it: RMSNorm, SwiGLU, rotary; no biases, and eps 1e-5, unless `block` says so."""
    plain = {"norm": "rms", "eps": 1e-5, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
    gated = BlockConfig(width, heads, hidden, activation="swiglu", **{**plain, **block})
    return DecoderConfig("llama", gated, layers, vocab, rotary_base=base)


def _qwen(width: int, heads: int, layers: int, hidden: int) -> DecoderConfig:
    """Alibaba's first Qwen: a LLaMA with biases on queries, keys and values."""
    return replace(
        _llama(width, heads, layers, hidden, vocab=151_936, eps=1e-6, qkv_bias=True), family="qwen"
    )


MPT_1B = _mpt(2048, 16, 24, qk_norm="full")
MPT_7B = _mpt(4096, 32, 32)
REDPAJAMA_3B = DecoderConfig("gpt_neox", BlockConfig(2560, 32, 10_240), layers=32, vocab=50_432)
OPT_2_7B = _opt(2560, 32, 32)
OPT_6_7B = _opt(4096, 32, 32)
FLAN_T5_XL = T5Config(2048, 64, 32, 5120, layers=24, decoder_layers=24, vocab=32_128)
FLAN_T5_XXL = T5Config(4096, 64, 64, 10_240, layers=24, decoder_layers=24, vocab=32_128)
LLAMA_7B = _llama(4096, 32, 32, 11_008, eps=1e-6)  # and Vicuna up to 1.3
LLAMA_13B = _llama(5120, 40, 40, 13_824, eps=1e-6)
LLAMA2_7B = _llama(4096, 32, 32, 11_008)  # and Vicuna 1.5
LLAMA2_13B = _llama(5120, 40, 40, 13_824)
LLAMA3_8B = _llama(4096, 32, 32, 14_336, vocab=128_256, base=5e5, kv_heads=8)
MISTRAL_7B = _llama(4096, 32, 32, 14_336, base=1e6, kv_heads=8)  # 0.2
MISTRAL_7B_WINDOW = replace(MISTRAL_7B, rotary_base=10_000.0, window=4096)  # 0.1
YI_6B = _llama(4096, 32, 32, 11_008, vocab=64_000, base=5e6, kv_heads=4)
YI_34B = _llama(7168, 56, 60, 20_480, vocab=64_000, base=5e6, kv_heads=8)
INTERNLM_7B = _llama(4096, 32, 32, 11_008, vocab=103_168, qkv_bias=True, out_bias=True)  # XComposer's
QWEN_1_8B = _qwen(2048, 16, 24, 5504)
QWEN_7B = _qwen(4096, 32, 32, 11_008)
STABLELM_1_6B = replace(
    _llama(2048, 32, 24, 5632, vocab=100_352, norm="layer", qkv_bias=True), rotary_fraction=0.25
)
PHI_2 = DecoderConfig(
    "phi", BlockConfig(2560, 32, 10_240, activation="gelu_tanh", parallel=True), layers=32, vocab=51_200,
    rotary_fraction=0.4, head_bias=True,
)  # fmt: skip
PERSIMMON_8B = DecoderConfig(
    "persimmon", BlockConfig(4096, 64, 16_384, activation="squared_relu", qk_norm="head"), layers=36, vocab=262_144,
    rotary_base=25_000.0, rotary_fraction=0.5,
)  # fmt: skip
# A tied head tells words apart by their embeddings alone, and short texts never move those of words that always stand in one
# another's place: they have to start apart.
TINY = replace(_mpt(128, 4, 4), vocab=512, std=0.3)
TINY_QWEN = replace(_qwen(128, 4, 4, 256), vocab=512, std=0.3)
