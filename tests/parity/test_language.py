"""Against Hugging Face's MPT, GPT-NeoX, LLaMA, OPT and CLIP at small sizes: logits, patch tokens and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import weights
from mmkernels.layers import BlockConfig, Decoder, DecoderConfig, VisionConfig, VisionTower
from mmkernels.models.language import LLAMA_7B, MPT_7B, OPT_2_7B, REDPAJAMA_3B

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


def _llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, rms_norm_eps=1e-6)
    return transformers.LlamaForCausalLM(config), "llama", _small(LLAMA_7B, hidden=64, kv_heads=2)


def _opt():
    config = transformers.OPTConfig(**SMALL, ffn_dim=192, dropout=0.0)
    return transformers.OPTForCausalLM(config), "opt", replace(_small(OPT_2_7B), max_positions=64)


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
@pytest.mark.parametrize("make", [_mpt, _gpt_neox, _llama, _opt])
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
