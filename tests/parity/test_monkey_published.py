"""Monkey's block and vision side against plain implementations with the authors' names: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from published_monkey import Block, Visual

from mmkernels import models, weights
from mmkernels.layers import MonkeyBlock
from mmkernels.models.monkey import MonkeyVision, VisionConfig

BOTH = [torch.float64, torch.float32]
SIZES = {"patch": 4, "width": 24, "layers": 2, "heads": 3, "hidden": 40, "grid": 3}


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_block(agree, dtype):
    """Views of windows 2, none, 0 and 2 in one batch; window 1 has none."""
    torch.manual_seed(0)
    theirs, ours = Block(24, 3, 40, 3).to(dtype), MonkeyBlock(24, 3, 40, 3).to(dtype).eval()
    window = [2, None, 0, 2]
    x = torch.randn(4, 5, 24, dtype=dtype)
    index = torch.tensor([-1 if w is None else w for w in window])

    def run(t):
        return torch.cat([theirs(t[n : n + 1], w) for n, w in enumerate(window)])

    agree(ours, theirs, "monkey", lambda t: ours(t, index), run, (x,))
    assert not ours.mlp_lora.a.grad[1].any() and ours.mlp_lora.scale.grad[2].any()
    torch.testing.assert_close(
        ours(x, 0), torch.cat([theirs(x[n : n + 1], 0) for n in range(4)]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours(x), theirs(x, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("canvas", [(24, 24), (25, 39)], ids=["square", "wide"])
def test_vision_side(agree, canvas, dtype):
    torch.manual_seed(1)
    count = (canvas[0] // 12) * (canvas[1] // 12)
    config = VisionConfig(canvas, 12, cells=3, lm_width=32, lm_heads=4, **SIZES)
    assert config.windows == count and config.slots == 9 * (count + 1)
    theirs = Visual(4, 24, 2, 3, 40, 32, 4, 3, 12, count).to(dtype)
    ours = MonkeyVision(config).to(dtype).eval()
    images = torch.randn(2, 3, *canvas, dtype=dtype)
    agree(ours, theirs, "monkey", ours, theirs, (images,))


def test_a_released_file():
    torch.manual_seed(2)
    model = models.build("monkey-tiny").eval()
    assert isinstance(model, models.Monkey)
    c = model.config.vision
    theirs = Visual(8, 128, 2, 4, 256, 128, 4, 4, 32, 4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    state = {f"transformer.visual.{k}": v for k, v in theirs.state_dict().items()}
    qwen = {
        "embedding.weight": "transformer.wte.weight", "norm.weight": "transformer.ln_f.weight", "head.weight": "lm_head.weight"
    }  # fmt: skip
    lm = model.lm.state_dict()
    state |= {theirs: torch.randn_like(lm[ours]) for ours, theirs in qwen.items()}
    for i in range(4):
        at = f"transformer.h.{i}."
        for ours, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2"), ("attention.out", "attn.c_proj"),
                           ("mlp.down", "mlp.c_proj")):  # fmt: skip
            state[f"{at}{name}.weight"] = lm[f"blocks.{i}.{ours}.weight"]
        for end in ("weight", "bias"):
            state[f"{at}attn.c_attn.{end}"] = lm[f"blocks.{i}.attention.qkv.{end}"]
        state[f"{at}mlp.w2.weight"], state[f"{at}mlp.w1.weight"] = lm[f"blocks.{i}.mlp.up.weight"].chunk(2)
    weights.load(model, state, source="monkey")
    images = torch.randn(1, 1, 3, *c.canvas)
    torch.testing.assert_close(model.encode(images)[0], theirs(images[0]), rtol=1e-4, atol=1e-4)
    weights.load(model.vision, state, source="monkey")
    weights.load(model.vision.resampler, state, source="monkey")
    del state["transformer.visual.transformer.resblocks.1.mlp_lora.3.lora_scale"]
    with pytest.raises(ValueError, match=r"missing: .*mlp_lora\.3\.lora_scale"):
        weights.load(model, state, source="monkey")
