"""Decoders of every family with experts that are copies: the same output, chosen layers, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import weights
from mmkernels.layers import Decoder, ExpertsConfig, MoE, make_dense, upcycle
from mmkernels.layers.upcycling import has_experts, idle_parameters, placed
from mmkernels.models import language

FAMILIES = {
    "mpt": language.MPT_1B, "gpt_neox": language.REDPAJAMA_3B, "opt": language.OPT_2_7B, "llama": language.LLAMA_7B,
    "qwen": language.QWEN_1_8B, "stablelm": language.STABLELM_1_6B, "phi": language.PHI_2,
    "persimmon": language.PERSIMMON_8B,
}  # fmt: skip
EXPERTS = ExpertsConfig(4, 2)


def _small(name: str) -> Decoder:
    c = FAMILIES[name]
    torch.manual_seed(0)
    return Decoder(
        replace(c, block=replace(c.block, width=32, heads=4, hidden=48), layers=3, vocab=50)
    ).double()


def _run(lm: Decoder, ids: torch.Tensor):
    positions = lm.positions(None, tuple(ids.shape), None)
    seen, x = lm.visibility(None, positions, None), lm.add_positions(lm.embed(ids), positions)
    for block in lm.blocks:
        x = block(x, seen)
    return lm.logits(x), seen.routings.kept


@pytest.mark.parametrize("name", FAMILIES)
def test_every_decoder_computes_what_it_did(name):
    lm, ids = _small(name), torch.randint(0, 50, (2, 7))
    before, none = _run(lm, ids)
    dense = sum(p.numel() for p in lm.parameters())
    assert upcycle(lm, EXPERTS, "sparse") == (0, 2) and not none
    after, routings = _run(lm, ids)
    assert len(routings) == 2 and routings[0].experts.shape == (14, 2)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
    one = sum(p.numel() for p in lm.blocks[1].mlp.parameters())
    grown = sum(p.numel() for p in lm.parameters())
    gates = 2 * 4 * 32
    assert grown == dense + 2 * 3 * one + gates and idle_parameters(lm) == 2 * 2 * one
    for layer in (0, 2):  # one that has learned differs from the others, and comes back
        with torch.no_grad():
            lm.blocks[layer].mlp.w_in[1:] += 1
    make_dense(lm)
    assert not has_experts(lm) and torch.equal(_run(lm, ids)[0], before)


@pytest.mark.parametrize("name", ["llama", "qwen", "phi", "persimmon"])
def test_a_decoder_with_experts_loads_their_keys(name):
    lm, other = _small(name), _small(name)
    source = FAMILIES[name].family
    upcycle(lm, EXPERTS)
    upcycle(other, EXPERTS)
    for p in lm.parameters():
        torch.nn.init.normal_(p)
    ids = torch.randint(0, 50, (1, 5))
    state = _published(lm, source)
    assert any("deepspeed_experts.3" in key for key in state)
    weights.load(other, state, source=source)
    assert torch.equal(_run(other, ids)[0], _run(lm, ids)[0])


def _published(lm: Decoder, source: str) -> dict[str, torch.Tensor]:
    """Written by hand for what sits inside of experts, by the dense decoder's own table elsewhere."""
    inner = {
        "llama": ("model.layers.{}.mlp.", ("gate_proj", "up_proj"), "down_proj"),
        "qwen": ("transformer.h.{}.mlp.", ("w2", "w1"), "c_proj"),
        "phi": ("model.layers.{}.mlp.", ("fc1",), "fc2"),
        "persimmon": ("model.layers.{}.mlp.", ("dense_h_to_4h",), "dense_4h_to_h"),
    }[source]
    state = {}
    for layer, block in enumerate(lm.blocks):
        if not isinstance(block.mlp, MoE):
            continue
        moe, at = block.mlp, inner[0].format(layer) + "deepspeed_moe."
        state[f"{at}gate.wg.weight"] = moe.gate.weight.detach()
        for e in range(moe.experts):
            expert = f"{at}experts.deepspeed_experts.{e}."
            for end, up, down in (("weight", moe.w_in, moe.w_out), ("bias", moe.b_in, moe.b_out)):
                if up is None:
                    continue
                for name, rows in zip(inner[1], up[e].detach().chunk(len(inner[1])), strict=True):
                    state[f"{expert}{name}.{end}"] = rows
                state[f"{expert}{inner[2]}.{end}"] = down[e].detach()
    heads, c = lm.config.block.heads, lm.config.block
    for name, value in lm.state_dict().items():
        if ".mlp." in name and isinstance(lm.blocks[int(name.split(".")[1])].mlp, MoE):
            continue
        rule, keys = next((r, k) for r in lm.published(source).rules if (k := r.sources(name)) is not None)
        if source == "persimmon" and ".qkv." in name:  # head by head in their file
            value = value.unflatten(0, (3, heads, c.width // heads)).transpose(0, 1).flatten(0, 2)
        rows = [len(value) // len(keys)] * len(keys)
        state |= dict(zip(keys, value.split(rows), strict=True))
        assert rule.value([state[k] for k in keys]).shape == lm.state_dict()[name].shape
    return state


def test_where_experts_stand():
    assert placed("sparse", 5) == (0, 2, 4) and placed("dense", 3) == (0, 1, 2)
    assert placed("first_half", 5) == (0, 1) and placed("second_half", 5) == (2, 3, 4)
    assert placed(3, 8) == (0, 3, 6) and placed((4, 1), 6) == (1, 4)
    for wrong, match in (
        ("all", "placement: got 'all', expected one of"), (0, "placement: got 0"),
        ((1, 6), "distinct ones of 0 to 5"), ((1, 1), "distinct ones"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            placed(wrong, 6)


def test_what_has_no_dense_feed_forward_is_refused_and_left_alone():
    lm = _small("llama")
    upcycle(lm, EXPERTS, (1,))
    with pytest.raises(ValueError, match="decoder: layer 1 has experts already"):
        upcycle(lm, EXPERTS, "dense")
    assert [isinstance(b.mlp, MoE) for b in lm.blocks] == [False, True, False]
    lm.blocks[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="layer 0 is a Identity, expected Block"):
        upcycle(lm, EXPERTS, (0,))
