"""Against the modality block of Hugging Face's Ernie 4.5 VL: with one expert for each modality it is CogVLM's feed-forward.

What lines up: the choice by token type, both gated experts, every gradient. Their routers are left with one expert each, whose
weight is 1, and their shared experts are off; their attention does not know modalities.
"""

from __future__ import annotations

import pytest
import torch

from mmkernels import expert_mlp

transformers = pytest.importorskip("transformers")
ernie = pytest.importorskip("transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe")

WIDTH, HIDDEN = 32, 24


def _theirs():
    config = transformers.Ernie4_5_VLMoeConfig().text_config
    config.update({
        "hidden_size": WIDTH, "moe_intermediate_size": [HIDDEN, HIDDEN], "moe_num_experts": 1, "num_experts": 1,
        "moe_k": 1, "num_experts_per_tok": 1, "moe_num_shared_experts": 0,
    })  # fmt: skip
    config._experts_implementation = "eager"
    block = ernie.Ernie4_5_VLMoeMoeBlock(config).double()
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return block


@pytest.mark.parametrize("types", [
    [[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]], [[0] * 7] * 2, [[1] * 7] * 2, [[0, 1, 0, 1, 0, 1, 0]] * 2,
], ids=["mixed", "text", "vision", "alternating"])  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_modality_block(types):
    block, types = _theirs(), torch.tensor(types)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs_x, ours_x = (x.clone().requires_grad_() for _ in range(2))
    experts = [block.text_moe.experts, block.vision_moe.experts]
    ups, downs = (
        [getattr(e, name)[0].detach().clone().requires_grad_() for e in experts]
        for name in ("gate_up_proj", "down_proj")
    )
    theirs = block(theirs_x, types)[0]
    ours = expert_mlp(ours_x.view(-1, WIDTH), types.flatten().bool(), tuple(ups), tuple(downs)).view(x.shape)
    torch.testing.assert_close(ours, theirs)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    for e, up, down in zip(experts, ups, downs, strict=True):
        for own, published in ((up, e.gate_up_proj), (down, e.down_proj)):
            expected = torch.zeros_like(own) if published.grad is None else published.grad[0]
            torch.testing.assert_close(own.grad, expected)
            assert published.grad is not None or not own.grad.any()  # exactly 0
