"""The language models under the families, as configs of the one decoder and of T5."""

from __future__ import annotations

from dataclasses import replace

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


def _llama(width: int, heads: int, layers: int, hidden: int) -> DecoderConfig:
    """Meta's LLaMA: RMSNorm, SwiGLU, rotary, no biases."""
    block = BlockConfig(
        width,
        heads,
        hidden,
        activation="swiglu",
        norm="rms",
        eps=1e-6,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return DecoderConfig("llama", block, layers, vocab=32_000)


def _qwen(width: int, heads: int, layers: int, hidden: int) -> DecoderConfig:
    """Alibaba's Qwen: LLaMA with biases on queries, keys and values. Exact up to the 2048 tokens it was trained with."""
    llama = _llama(width, heads, layers, hidden)
    return replace(llama, family="qwen", block=replace(llama.block, qkv_bias=True), vocab=151_936)


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


MPT_1B = _mpt(2048, 16, 24, qk_norm="full")
MPT_7B = _mpt(4096, 32, 32)
REDPAJAMA_3B = DecoderConfig("gpt_neox", BlockConfig(2560, 32, 10_240), layers=32, vocab=50_432)
LLAMA_7B = _llama(4096, 32, 32, 11_008)
QWEN_7B = _qwen(4096, 32, 32, 11_008)
TINY_QWEN = replace(_qwen(128, 4, 4, 256), vocab=512)
LLAMA_13B = _llama(5120, 40, 40, 13_824)
OPT_2_7B = _opt(2560, 32, 32)
OPT_6_7B = _opt(4096, 32, 32)
FLAN_T5_XL = T5Config(2048, 64, 32, 5120, layers=24, decoder_layers=24, vocab=32_128)
FLAN_T5_XXL = T5Config(4096, 64, 64, 10_240, layers=24, decoder_layers=24, vocab=32_128)
TINY = replace(_mpt(128, 4, 4), vocab=512)
