"""Against Hugging Face's Mixtral: its block, its loss, and a whole language model, from both forms of its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import weights
from mmkernels.layers import Decoder, ExpertsConfig, MoE, upcycle
from mmkernels.models import language
from mmkernels.ops.moe import load_balancing_loss

transformers = pytest.importorskip("transformers")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
DTYPES = (torch.float64, torch.float32)


def _config(**more):
    return transformers.MixtralConfig(
        hidden_size=32, intermediate_size=40, num_local_experts=5, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=50, rms_norm_eps=1e-6, **more,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_block_and_its_gradients(agree, dtype):
    torch.manual_seed(0)
    theirs = mixtral.MixtralSparseMoeBlock(_config()).to(dtype)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = MoE(32, 40, 5, 2).to(dtype)
    x = torch.randn(2, 7, 32, dtype=dtype)
    # theirs takes the router's softmax in float32, whatever the dtype
    agree(ours, theirs, "mixtral", lambda x: ours(x)[0], theirs, [x], tolerance=3e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_balancing_loss_of_all_layers(masked):
    torch.manual_seed(0)
    layers = tuple(torch.randn(12, 5, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]) if masked else None
    theirs = mixtral.load_balancing_loss_func(layers, 5, 2, mask)
    ours = load_balancing_loss(layers, 5, 2, mask)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if not masked:
        moe = MoE(32, 40, 5, 2)
        x = torch.randn(12, 32)
        torch.testing.assert_close(moe(x)[1], mixtral.load_balancing_loss_func((moe.gate(x),), 5, 2))


def test_a_whole_language_model_from_its_file():
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(_config(rope_theta=1e6)).double().eval()
    theirs.set_experts_implementation("eager")  # their grouped product knows no float64
    c = language.MISTRAL_7B
    block = replace(c.block, width=32, heads=4, kv_heads=2, hidden=40, eps=1e-6)
    lm = Decoder(replace(c, block=block, layers=2, vocab=50)).double().eval()
    upcycle(lm, ExpertsConfig(5, 2), "dense")
    state = {}
    for name, value in theirs.state_dict().items():  # as it is on disk: expert by expert
        if name.endswith("gate_up_proj"):
            at = name.replace("mlp.experts.gate_up_proj", "block_sparse_moe.experts")
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                state |= {f"{at}.{e}.w1.weight": gate, f"{at}.{e}.w3.weight": up}
        elif name.endswith("down_proj"):
            at = name.replace("mlp.experts.down_proj", "block_sparse_moe.experts")
            state |= {f"{at}.{e}.w2.weight": down for e, down in enumerate(value)}
        else:
            state[name.replace("mlp.gate", "block_sparse_moe.gate")] = value
    weights.load(lm, state, source="llama")
    ids = torch.randint(0, 50, (2, 9))
    positions = lm.positions(None, (2, 9), None)
    seen, x = lm.visibility(None, positions, None), lm.embed(ids)
    for part in lm.blocks:
        x = part(x, seen)
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(x), theirs(ids).logits, rtol=1e-4, atol=3e-6)
