"""Against the Idefics layers of Hugging Face: gated block and resampler, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from mmkernels.layers import GatedCrossAttentionBlock, PerceiverResampler

transformers = pytest.importorskip("transformers")
TOLERANCE = {
    torch.float64: 3e-6,
    torch.float32: 3e-5,
}  # theirs takes softmax and RMS in float32 whatever comes in


def _config(**changes):
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 1,
        "vision_config": {"embed_dim": 24},
        "perceiver_config": {"qk_layer_norms_perceiver": changes.pop("resampler_norm", False)},
    }  # fmt: skip
    config = transformers.IdeficsConfig(**{**sizes, **changes})
    config._attn_implementation = "eager"
    return config


def _visibility(times, images, latents, dtype):
    """The additive mask [B, 1, T, I L] and the gate [B, T] that their processor and model make for last-image attention."""
    seen = torch.nn.functional.one_hot(times, images + 1)[..., 1:].bool().repeat_interleave(latents, -1)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask.unsqueeze(1), (times > 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("gate", ["float", "vector"])
def test_gated_block(agree, gate, qk_norm, dtype):
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    torch.manual_seed(0)
    theirs = IdeficsGatedCrossAttentionLayer(
        _config(alpha_type=gate, qk_layer_norms=qk_norm), layer_idx=0
    ).to(dtype)
    ours = GatedCrossAttentionBlock(
        32, 24, heads=4, head_dim=8, ff_mult=1.5, norm="rms", ffn="swiglu", no_media="zero", qk_norm=qk_norm,
        gate={"float": "scalar", "vector": "vector"}[gate],
    ).to(dtype)  # fmt: skip
    where = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    mask, seen = _visibility(where.cumsum(1), 3, 5, dtype)
    x, media = torch.randn(2, 6, 32, dtype=dtype), torch.randn(2, 3, 5, 24, dtype=dtype)
    agree(
        ours,
        theirs,
        "idefics",
        lambda a, b: ours(a, b, where),
        lambda a, b: theirs(a, None, b.flatten(1, 2), mask, seen),
        (x, media),
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_resampler(agree, qk_norm, dtype):
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    torch.manual_seed(1)
    theirs = IdeficsPerceiverResampler(_config(resampler_norm=qk_norm), 24, 2, 3, 8, 6).to(dtype)
    ours = PerceiverResampler(24, depth=2, heads=3, head_dim=8, latents=6, ffn="relu", qk_norm=qk_norm).to(
        dtype
    )
    media = torch.randn(4, 10, 24, dtype=dtype)
    agree(ours, theirs, "idefics", lambda m: ours(m[:, None, None]).squeeze(1), theirs, (media,))
