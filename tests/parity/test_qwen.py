"""Qwen-VL's resampler against a plain implementation with the authors' names: forward, every gradient, masks, grids."""

from __future__ import annotations

import pytest
import torch
from published_qwen import Resampler, Visual
from torch import nn

from mmkernels import weights
from mmkernels.layers import QwenResampler, VisionConfig, VisionTower

BOTH = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("source", ["qwen_vl", "monkey"])
@pytest.mark.parametrize("media_width", [20, 32], ids=["projected", "as_wide"])
def test_resampler(agree, media_width, source, dtype):
    torch.manual_seed(0)
    theirs, ours = (cls(3, 32, 4, media_width).to(dtype) for cls in (Resampler, QwenResampler))
    for tokens in (9, 36, 4):  # as many as queries, more, fewer: the table is stretched both ways
        x = torch.randn(2, tokens, media_width, dtype=dtype)
        ours.zero_grad(), theirs.zero_grad()
        agree(ours, theirs, source, ours, theirs, (x,))


@pytest.mark.parametrize("grid", [(2, 7), (5, 3)], ids=str)
def test_grids_that_are_no_square(agree, grid):
    torch.manual_seed(1)
    theirs, ours = Resampler(4, 32, 2, 24).double(), QwenResampler(4, 32, 2, 24).double()
    x = torch.randn(3, grid[0] * grid[1], 24, dtype=torch.float64)
    agree(ours, theirs, "qwen_vl", lambda t: ours(t, grid_hw=grid), lambda t: theirs(t, grid), (x,))


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_masks_block(agree, dtype):
    torch.manual_seed(2)
    theirs, ours = Resampler(3, 16, 2, 12).to(dtype), QwenResampler(3, 16, 2, 12).to(dtype)
    blocked = torch.rand(9, 25) < 0.4
    blocked[:, 0] = False
    x = torch.randn(2, 25, 12, dtype=dtype)
    agree(
        ours,
        theirs,
        "qwen_vl",
        lambda t: ours(t, attn_mask=blocked),
        lambda t: theirs(t, blocked=blocked),
        (x,),
    )


@pytest.mark.parametrize("mask", ["none", "bool", "float", "per_head"])
def test_the_attention_step_is_torch_multihead_attention(mask):
    """Theirs runs exactly this call; a mask's True blocks, and a floating one is added."""
    torch.manual_seed(3)
    ours = QwenResampler(3, 32, 4, 32).double()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias}
    state |= {f"out_proj.{end}": getattr(ours.out, end) for end in ("weight", "bias")}
    theirs.load_state_dict(state)
    given = {
        "none": None,
        "bool": torch.rand(9, 9) < 0.5,
        "float": torch.randn(9, 9, dtype=torch.float64).masked_fill(torch.rand(9, 9) < 0.3, -torch.inf),
        "per_head": torch.rand(2 * 4, 9, 9) < 0.5,
    }[mask]
    if given is not None:
        given[..., 2] = 0
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    c = ours.media_norm(x)
    q = (ours.query_norm(ours.query) + ours.positions).expand(2, -1, -1)
    want = theirs(q, c + ours.positions, c, attn_mask=given, need_weights=False)[0]
    got = ours(x, attn_mask=given)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    up = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad((got * up).sum(), x)[0], torch.autograd.grad((want * up).sum(), x)[0]
    )


def test_a_whole_file_gives_its_resampler():
    torch.manual_seed(4)
    theirs, ours = Resampler(3, 32, 4, 20), QwenResampler(3, 32, 4, 20)
    state = {f"transformer.visual.attn_pool.{k}": v for k, v in theirs.state_dict().items()}
    state |= {"transformer.visual.ln_post.weight": torch.ones(32), "lm_head.weight": torch.ones(3, 32)}
    weights.load(ours, state, source="qwen_vl")
    x = torch.randn(1, 16, 20)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.positions, theirs.pos_embed) and not ours.positions.requires_grad
    del state["transformer.visual.attn_pool.pos_embed"]
    with pytest.raises(ValueError, match="missing: pos_embed"):
        weights.load(ours, state, source="monkey")


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("side", [3, 6, 5], ids=["as_stored", "doubled", "odd"])
def test_tower(agree, side, dtype):
    """Per-head rows of `in_proj`, no class token, positions of nine cells under images of other sizes."""
    torch.manual_seed(5)
    theirs = Visual(4, 24, 2, 3, 40, 32, 4, 3).to(dtype)
    for part in ("attn_pool", "ln_post", "proj"):
        delattr(theirs, part)
    config = VisionConfig(12, 4, 24, 2, 3, 40, "gelu", 1e-6, class_token=False, any_size=True)
    ours = VisionTower(config).to(dtype)
    images = torch.randn(2, 3, 4 * side, 4 * side, dtype=dtype)
    agree(ours, theirs, "qwen_vl", ours, theirs.tower, (images,))
