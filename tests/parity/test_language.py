"""Against Hugging Face: every language model at a small size (logits, every gradient) and at its own (parameters); CLIP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from mmkernels import weights
from mmkernels.layers import BlockConfig, Decoder, DecoderConfig, VisionConfig, VisionTower
from mmkernels.models import language
from mmkernels.models.language import MPT_7B, REDPAJAMA_3B

transformers = pytest.importorskip("transformers")
TOLERANCE = {torch.float64: 3e-6, torch.float32: 5e-5}  # theirs takes softmax, ALiBi and angles in float32
DTYPES = (torch.float64, torch.float32)
SMALL = {
    "vocab_size": 40,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def _small(config: DecoderConfig, **block) -> DecoderConfig:
    """The preset's own switches at the size of `SMALL`."""
    sizes = {"width": 48, "heads": 6, "hidden": 192, **block}
    return replace(config, block=replace(config.block, **sizes), layers=2, vocab=40)


def _mpt():
    attention = {"alibi": True, "attn_impl": "eager"}
    config = transformers.MptConfig(
        d_model=48, n_heads=6, n_layers=2, vocab_size=40, max_seq_len=64, attn_config=attention
    )
    return transformers.MptForCausalLM(config), "mpt", _small(MPT_7B)


def _gpt_neox():
    config = transformers.GPTNeoXConfig(
        **SMALL, intermediate_size=192, use_parallel_residual=False, hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config), "gpt_neox", _small(REDPAJAMA_3B)


def _sizes(
    width: int, layers: int, heads: int, hidden: int, vocab: int = 32_000, kv_heads: int | None = None
):
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden,
        "vocab_size": vocab, **({} if kv_heads is None else {"num_key_value_heads": kv_heads}),
    }  # fmt: skip


def _rotary(base: float, fraction: float = 1.0):
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}
    }


def _opt_sizes(width: int, hidden: int):
    sizes = _sizes(width, 32, 32, hidden, 50_272)
    # their embedding gives the row of padding, 1, no gradient
    return {"dropout": 0.0, "pad_token_id": None, "ffn_dim": sizes.pop("intermediate_size"), **sizes}


LLAMA2 = {"rms_norm_eps": 1e-5, **_rotary(1e4)}
YI = {"rms_norm_eps": 1e-5, **_rotary(5e6)}
MISTRAL = {**_sizes(4096, 32, 32, 14_336, kv_heads=8), "rms_norm_eps": 1e-5}
# our preset -> the published config as their class takes it (Qwen2 computes what the first Qwen does)
PUBLISHED = {
    "OPT_2_7B": ("OPT", _opt_sizes(2560, 10_240)),
    "OPT_6_7B": ("OPT", _opt_sizes(4096, 16_384)),
    "LLAMA_7B": ("Llama", {**_sizes(4096, 32, 32, 11_008), "rms_norm_eps": 1e-6}),
    "LLAMA_13B": ("Llama", {**_sizes(5120, 40, 40, 13_824), "rms_norm_eps": 1e-6}),
    "LLAMA2_7B": ("Llama", {**_sizes(4096, 32, 32, 11_008), **LLAMA2}),
    "LLAMA2_13B": ("Llama", {**_sizes(5120, 40, 40, 13_824), **LLAMA2}),
    "LLAMA3_8B": ("Llama", {**_sizes(4096, 32, 32, 14_336, 128_256, 8), "rms_norm_eps": 1e-5, **_rotary(5e5)}),
    "MISTRAL_7B": ("Mistral", {**MISTRAL, "sliding_window": None, **_rotary(1e6)}),
    "MISTRAL_7B_WINDOW": ("Mistral", {**MISTRAL, "sliding_window": 4096, **_rotary(1e4)}),
    "YI_6B": ("Llama", {**_sizes(4096, 32, 32, 11_008, 64_000, 4), **YI}),
    "YI_34B": ("Llama", {**_sizes(7168, 60, 56, 20_480, 64_000, 8), **YI}),
    "INTERNLM_7B": ("Llama", {**_sizes(4096, 32, 32, 11_008, 103_168), "attention_bias": True, **LLAMA2}),
    "QWEN_1_8B": ("Qwen2", {**_sizes(2048, 24, 16, 5504, 151_936, 16), **_rotary(1e4)}),
    "QWEN_7B": ("Qwen2", {**_sizes(4096, 32, 32, 11_008, 151_936, 32), **_rotary(1e4)}),
    "STABLELM_1_6B": (
        "StableLm", {**_sizes(2048, 24, 32, 5632, 100_352, 32), "use_qkv_bias": True, **_rotary(1e4, 0.25)},
    ),
    "PHI_2": ("Phi", {**_sizes(2560, 32, 32, 10_240, 51_200), **_rotary(1e4, 0.4)}),
    "PERSIMMON_8B": ("Persimmon", {**_sizes(4096, 36, 64, 16_384, 262_144), **_rotary(25e3, 0.5)}),
}  # fmt: skip
KINDS = [  # one of each mathematics
    "OPT_2_7B", "LLAMA_7B", "LLAMA3_8B", "MISTRAL_7B_WINDOW", "INTERNLM_7B", "QWEN_7B", "STABLELM_1_6B", "PHI_2",
    "PERSIMMON_8B",
]  # fmt: skip


def _theirs(kind: str, config: dict) -> torch.nn.Module:
    made = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind}ForCausalLM")(made)


def _published(name: str):
    """A preset and its published config with the switches that they have, both at a small size."""
    kind, config = PUBLISHED[name]
    preset: DecoderConfig = getattr(language, name)
    small = {**config, **SMALL, "ffn_dim" if kind == "OPT" else "intermediate_size": 64}
    width, heads = (80, 2) if kind == "Phi" else (48, 6)  # the turned part of a head must be even
    small |= {"hidden_size": width, "num_attention_heads": heads}
    grouped = (
        config.get("num_key_value_heads", config["num_attention_heads"]) != config["num_attention_heads"]
    )
    kv_heads = 2 if grouped else heads
    if "num_key_value_heads" in config:
        small["num_key_value_heads"] = kv_heads
    if config.get("sliding_window"):
        small["sliding_window"] = 5
    ours = replace(
        _small(preset, width=width, heads=heads, hidden=64, kv_heads=kv_heads),
        max_positions=64,
        window=preset.window and 5,
    )
    source = "llama" if kind == "Qwen2" else ours.family
    return _theirs(kind, small), source, ours


class _Logits(torch.nn.Module):
    """A decoder run as a language model: what families do, with nothing between the blocks."""

    def __init__(self, lm: Decoder, mask: torch.Tensor) -> None:
        super().__init__()
        self.lm, self.mask = lm, mask

    def forward(self, ids):
        positions = self.lm.positions(self.mask, tuple(ids.shape), None)
        seen = self.lm.visibility(self.mask, positions, None)
        x = self.lm.add_positions(self.lm.embed(ids), positions)
        for block in self.lm.blocks:
            x = block(x, seen)
        return self.lm.logits(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [(), (3, 7)], ids=["one_table", "special_rows"])
@pytest.mark.parametrize(
    "make", [_mpt, _gpt_neox, *(pytest.param(partial(_published, name), id=name) for name in KINDS)]
)
def test_decoder(agree, make, special, dtype):
    """Six heads: ALiBi slopes of a count that is no power of two. One row has padding on its left, one on its right."""
    torch.manual_seed(0)
    theirs, source, config = make()
    theirs = theirs.to(dtype).eval()
    ours = Decoder(config, special).to(dtype)
    ids = torch.randint(0, 40, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[2, 8:] = False
    if source != "mpt" or dtype == torch.float32:  # theirs makes NaN of padding on the left in float64
        mask[1, :4] = False
    logits = _Logits(ours, mask)
    valid = mask.unsqueeze(-1)  # what rows of padding compute is nobody's business
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = {} if source == "mpt" else {"position_ids": positions}

    def run_theirs():
        return theirs(input_ids=ids, attention_mask=mask.long(), **more).logits.where(valid, 0)

    if (
        special
    ):  # the published gradient of a row is split between our two tables: only outputs are comparable
        weights.load(ours, theirs.state_dict(), source=source)
        torch.testing.assert_close(logits(ids).where(valid, 0), run_theirs(), rtol=0, atol=TOLERANCE[dtype])
    else:
        agree(
            ours,
            theirs,
            source,
            lambda: logits(ids).where(valid, 0),
            run_theirs,
            (),
            tolerance=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    kind, config = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = Decoder(getattr(language, name)), _theirs(kind, config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_files_of_the_first_qwen():
    """Their names for what the Qwen2 class computes: one product for attention, `w1 x * silu(w2 x)`."""
    theirs, source, config = _published("QWEN_7B")
    plain, ours = Decoder(config), Decoder(config)
    weights.load(plain, theirs.state_dict(), source=source)
    block = "transformer.h.{}."
    inside = {
        "attn.c_attn.weight": "attention.qkv.weight", "attn.c_attn.bias": "attention.qkv.bias",
        "attn.c_proj.weight": "attention.out.weight", "ln_1.weight": "attention_norm.weight",
        "ln_2.weight": "mlp_norm.weight", "mlp.c_proj.weight": "mlp.down.weight",
    }  # fmt: skip
    have = plain.state_dict()
    state = {
        "transformer.wte.weight": have["embedding.weight"], "transformer.ln_f.weight": have["norm.weight"],
        "lm_head.weight": have["head.weight"],
    }  # fmt: skip
    for i in range(config.layers):
        state |= {block.format(i) + their: have[f"blocks.{i}.{our}"] for their, our in inside.items()}
        for their, our in (("w2", "gate_proj"), ("w1", "up_proj")):
            weight = theirs.state_dict()[f"model.layers.{i}.mlp.{our}.weight"]
            state[f"{block.format(i)}mlp.{their}.weight"] = weight
    weights.load(ours, state, source="qwen")
    assert all(torch.equal(value, have[name]) for name, value in ours.state_dict().items())


def test_qk_norm_over_the_full_width():
    """MPT-1B's extra norms, by their definition: the attention of normalised projections."""
    torch.manual_seed(0)
    block = BlockConfig(
        32, 4, 64, norm_bias=False, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm="full"
    )
    attention = Decoder(DecoderConfig("mpt", block, 1, 10)).double().blocks[0].attention
    with torch.no_grad():
        attention.q_norm.weight.normal_()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    q, k, v = attention._project(x)
    plain = attention.qkv(x)[..., :32]
    unit = (plain - plain.mean(-1, keepdim=True)) * (
        plain.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).rsqrt()
    torch.testing.assert_close(q.flatten(2), unit * attention.q_norm.weight)
    assert k.shape == v.shape == (2, 5, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_vision_tower(agree, activation, dtype):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=7,
        hidden_act=activation,
    )  # fmt: skip
    theirs = transformers.CLIPVisionModel(config).to(dtype).eval()
    ours = VisionTower(VisionConfig(28, 7, 32, 2, 2, 64, activation=activation)).to(dtype)
    images = torch.randn(3, 3, 28, 28, dtype=dtype)
    agree(
        ours, theirs, "huggingface_clip", ours, lambda x: theirs(x).last_hidden_state[:, 1:], (images,),
        tolerance=TOLERANCE[dtype],
    )  # fmt: skip
