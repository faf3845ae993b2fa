"""Patched models in use: generation with every cache, compiled, checkpointed, under autocast, with dropout."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.hf_models import Sizes, idefics, llava_next, mixtral
from benchmarks.hf_more_models import aria, qwen2_vl
from mmkernels.integrations import hf
from mmkernels.integrations.hf import _attention, _experts, _kept

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
Z = Sizes()


@pytest.fixture(autouse=True)
def _ours(monkeypatch):
    """However small: these are the sizes at which torch would be asked."""
    monkeypatch.setattr(_attention, "SMALL", 0)
    monkeypatch.setattr(_attention, "_skips_little", lambda *_: False)
    monkeypatch.setattr(_experts, "_torch_wins", lambda *_: False)


@pytest.fixture(autouse=True)
def _reverted():
    yield
    hf.revert()


def _generated(model, inputs, **options):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [mixtral, idefics, llava_next, aria, qwen2_vl])
def test_generation(make, cache):
    """Left-padded prompts, then a token at a time: the same tokens from the same logits."""
    model, inputs = make(Z) if make is not mixtral else mixtral(Z, left=True)
    if make is idefics:  # its processor pads on the left
        inputs = {**inputs, **{k: inputs[k].flip(1) for k in ("input_ids", "attention_mask")}}
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    theirs = _generated(model, inputs, **options)
    hf.patch(model)
    ours = _generated(model, inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_padding_leaves_the_decoder_but_not_the_cache():
    """What is packed: fewer rows reach the layers, and the cache holds the padded batch for the tokens to come."""
    model, inputs = llava_next(Z)
    hf.patch(model)
    rows = []
    layer = model.model.language_model.layers[0].mlp
    layer.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[:2]))
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    assert rows == [(1, int(inputs["attention_mask"].sum()))]
    held = getattr(out, "cache", None) or out.past_key_values
    assert held.get_seq_length() == inputs["input_ids"].shape[1]
    assert not out.logits[inputs["attention_mask"] == 0].any()


def test_media_keys_are_kept_for_one_image_only():
    model, inputs = idefics(Z)
    hf.patch(model)
    calls = []
    model.model.gated_cross_attn_layers[0].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    first = _generated(model, inputs)
    assert len(calls) == 1  # of five tokens
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    second = _generated(model, other)
    assert len(calls) == 2 and (first.logits[0] - second.logits[0]).abs().max() > 1e-3
    with torch.no_grad():
        model.model.gated_cross_attn_layers[0].cross_attn.v_proj.weight.mul_(2)  # a weight is written to
    third = _generated(model, other)
    hf.revert()
    for a, b in zip(third.logits, _generated(model, other).logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not len(_kept._KEPT)


@pytest.mark.parametrize("make", [mixtral, idefics])
def test_gradient_checkpointing(make):
    model, inputs = make(Z)
    hf.patch(model)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mixtral, idefics, llava_next, aria])
def test_autocast(make):
    """bfloat16 by autocast: as near to float32 as their own."""
    model, inputs = make(Z)
    seen = inputs["attention_mask"].bool()

    def logits(model, autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**inputs, use_cache=False).logits[seen].float()

    exact = logits(model, False)
    patched = copy.deepcopy(model)
    hf.patch(patched)
    try:
        theirs = logits(model, True)
    except RuntimeError:  # torch's grouped product takes no operands of two dtypes
        model.set_experts_implementation("eager")
        theirs = logits(model, True)
    error = (logits(patched, True) - exact).abs()
    assert (
        error.max() <= 2 * (theirs - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    )


def test_dropout_follows_torchs_seed():
    model, inputs = mixtral(Z, attention_dropout=0.3)
    hf.patch(model)
    model.train()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(**inputs, use_cache=False).logits)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_compiled():
    """One graph, attention as our op in it; masks given as such take torch's path inside."""
    model, inputs = mixtral(Z)
    hf.patch(model)
    inputs = {"input_ids": inputs["input_ids"], "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).logits
        ran = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(ran, plain, rtol=1e-5, atol=1e-5)
