"""Qwen-VL's resampler against a plain implementation with the authors' names: forward, every gradient, masks, grids."""

from __future__ import annotations

import pytest
import torch
from published_qwen import Resampler, Visual
from torch import nn

from mmkernels import models, weights
from mmkernels.layers import QwenResampler, VisionConfig, VisionTower
from mmkernels.models.qwen_vl import QwenVision

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


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("side", [3, 6], ids=["as_stored", "doubled"])
def test_the_whole_vision_side(agree, side, dtype):
    """Tower, resampler, norm, and the projection as it is stored: `x proj`, not transposed."""
    torch.manual_seed(6)
    theirs = Visual(4, 24, 1, 3, 40, 32, 4, 3).to(dtype)
    config = VisionConfig(12, 4, 24, 1, 3, 40, "gelu", 1e-6, class_token=False, any_size=True)
    ours = QwenVision(config, 3, 32, 4).to(dtype)
    images = torch.randn(2, 3, 4 * side, 4 * side, dtype=dtype)
    agree(ours, theirs, "qwen_vl", ours, theirs, (images,))


def _qwen_keys(llama_like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen2's parameters under the names of the first Qwen: the same mathematics, q, k and v in one tensor."""
    names = {
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    state = {"transformer.wte.weight": llama_like["model.embed_tokens.weight"]}
    state |= {
        "transformer.ln_f.weight": llama_like["model.norm.weight"],
        "lm_head.weight": llama_like["lm_head.weight"],
    }
    layers = {key.split(".")[2] for key in llama_like if key.startswith("model.layers.")}
    for i in layers:
        at = f"model.layers.{i}."
        for theirs, name in names.items():
            state[f"transformer.h.{i}.{name}.weight"] = llama_like[f"{at}{theirs}.weight"]
        for end in ("weight", "bias"):
            parts = [llama_like[f"{at}self_attn.{p}_proj.{end}"] for p in "qkv"]
            state[f"transformer.h.{i}.attn.c_attn.{end}"] = torch.cat(parts)
    return state


def test_a_released_file():
    """Every key of it is read, per-head rows and gate order included: images and logits are those of the parts."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    tiny = models.config("qwen_vl-tiny")
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    lm, visual = transformers.Qwen2ForCausalLM(config).eval(), Visual(8, 128, 2, 4, 256, 128, 4, 4)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    state = _qwen_keys(lm.state_dict())
    state |= {f"transformer.visual.{k}": v for k, v in visual.state_dict().items()}
    state["transformer.rotary_emb.inv_freq"] = torch.ones(16)  # constants of older files are not read
    model = models.build(tiny).eval()
    weights.load(model, state, source="qwen_vl")
    images = torch.randn(1, 1, 3, 64, 64)
    ids, mask = model.expand(torch.tensor([[5, 6, 2, 7, 8]]))
    with torch.no_grad():
        x = lm.model.embed_tokens(ids)
        x[0, 3:19] = visual(images[0])[0]
        want = lm(inputs_embeds=x).logits
        torch.testing.assert_close(model(images, ids, mask).logits, want, rtol=1e-4, atol=1e-4)
    key = "transformer.visual.attn_pool.ln_kv.bias"
    state["transformer.visual.attn_pool.more"] = state.pop(key)
    with pytest.raises(ValueError, match=rf"missing: {key}; left over: transformer\.visual\.attn_pool\.more"):
        weights.load(model, state, source="qwen_vl")


def test_a_whole_file_gives_its_vision_side():
    torch.manual_seed(8)
    config = VisionConfig(12, 4, 24, 1, 3, 40, "gelu", 1e-6, class_token=False, any_size=True)
    theirs, ours = Visual(4, 24, 1, 3, 40, 32, 4, 3), QwenVision(config, 3, 32, 4)
    state = {f"transformer.visual.{k}": v for k, v in theirs.state_dict().items()}
    state["lm_head.weight"] = torch.ones(3, 32)
    images = torch.randn(1, 3, 12, 12)
    weights.load(ours, state, source="qwen_vl")
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    weights.load(ours.tower, state, source="qwen_vl")  # the tower alone: what it feeds is not read
    torch.testing.assert_close(ours.tower(images), theirs.tower(images), rtol=1e-4, atol=1e-4)
    rows = theirs.transformer["resblocks"][0].attn.in_proj.weight
    for head in range(3):
        q, k, v = rows[24 * head : 24 * (head + 1)].chunk(3)
        for n, part in enumerate((q, k, v)):
            start = 24 * n + 8 * head
            assert torch.equal(ours.tower.blocks[0].attention.qkv.weight[start : start + 8], part)
