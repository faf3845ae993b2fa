"""`patch` and `revert`: what is replaced, what is refused, and that nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers

from benchmarks.hf_models import Sizes, idefics, llava, mixtral, mllama
from benchmarks.hf_more_models import aria
from mmkernels.integrations import hf

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # theirs, of one version or another
Z = Sizes()


@pytest.fixture(autouse=True)
def _reverted():
    yield
    hf.revert()


def _state(model):
    """Everything of a model but its tensors: attributes of every module and configuration."""
    held = {}
    for name, module in model.named_modules():
        held[name] = {k: v for k, v in vars(module).items() if not k.startswith("_") or k == "_forward_hooks"}
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            held[f"{name}.config"] = copy.deepcopy(vars(config))
    return {k: repr(v) for k, v in held.items()}


@pytest.mark.parametrize("make", [idefics, mixtral, mllama, llava, aria])
def test_revert_leaves_no_trace(make):
    model, inputs = make(Z)
    with torch.no_grad():
        first = model(**inputs).logits  # their first pass leaves hooks of its own
        classes = {type(m): dict(vars(type(m))) for m in model.modules()}
        before, weights = _state(model), {k: v.clone() for k, v in model.state_dict().items()}
        assert hf.patch(model) and _state(model) != before
        model(**inputs)
        hf.revert()
        assert _state(model) == before
        for cls, held in classes.items():
            assert dict(vars(cls)) == held, cls
        for key, value in model.state_dict().items():
            assert torch.equal(value, weights[key])
        assert torch.equal(model(**inputs).logits, first)


def test_patches_nest():
    model, _ = idefics(Z)
    before = _state(model)
    first = hf.patch(model, only="attention")
    assert first and all(line.endswith("attention") for line in first)
    second = hf.patch(model)
    assert second and not set(first) & set(second)
    assert hf.patch(model) == []  # all of it stands already
    hf.revert()
    assert _state(model) == before
    hf.revert()  # nothing left to do


def test_a_class_serves_the_models_made_of_it():
    cls = transformers.MixtralForCausalLM
    before = dict(vars(cls))
    assert hf.patch(cls) == ["MixtralForCausalLM.__init__: every model made of it is patched"]
    assert hf.patch(cls) == []
    model, _ = mixtral(Z)
    assert model.config._attn_implementation == model.config._experts_implementation == "mmkernels"
    hf.revert()
    assert dict(vars(cls)) == before
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_class_is_served_everywhere():
    from transformers.models.idefics.perceiver import IdeficsPerceiverAttention as Layer

    before = Layer.forward
    assert hf.patch(Layer) == ["IdeficsPerceiverAttention.forward: resampler"]
    assert Layer.forward is not before
    hf.revert()
    assert Layer.forward is before


def test_bad_arguments_are_refused():
    model, _ = mixtral(Z)
    with pytest.raises(ValueError, match="nothing in Linear matches"):
        hf.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing in MixtralForCausalLM matches resampler"):
        hf.patch(model, only="resampler")
    with pytest.raises(ValueError, match="nothing in Linear matches"):
        hf.patch(nn.Linear)
    with pytest.raises(ValueError, match=r"only: got \['attn'\], expected some of 'attention'"):
        hf.patch(model, only=["attn"])
    with pytest.raises(ValueError, match="no_media: got 'uniform'"):
        hf.patch(model, no_media="uniform")
    with pytest.raises(TypeError, match="model_or_class: got str"):
        hf.patch("mixtral")


def test_the_names_are_theirs_to_use():
    made, inputs = mixtral(Z)
    config = copy.deepcopy(made.config)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="mmkernels", experts_implementation="mmkernels"
    )
    model.load_state_dict(made.state_dict())
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(**inputs).logits[seen], made(**inputs).logits[seen], rtol=1e-4, atol=1e-5
        )


def test_mllamas_leak_is_kept_and_can_be_closed():
    """A token before the image moves with the image as published (transformers issue 39379), and does not with "zero"."""
    model, inputs = mllama(Z)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}

    def moved(rows):
        with torch.no_grad():
            return float((model(**inputs).logits[rows] - model(**other).logits[rows]).abs().max())

    before_image, after = (0, slice(0, 2)), (0, slice(2, None))
    assert moved(before_image) > 1e-2
    hf.patch(model)
    assert moved(before_image) > 1e-2
    hf.revert()
    hf.patch(model, no_media="zero")
    assert moved(before_image) == 0 and moved(after) > 1e-2


def test_an_adapter_on_a_fused_weight_is_not_read_past():
    """Idefics' gated layer is one op over `q_proj.weight`; where q_proj is more than its weight its own forward runs."""
    model, inputs = idefics(Z)
    hf.patch(model)
    layer = model.model.gated_cross_attn_layers[0].cross_attn
    with torch.no_grad():
        before = model(**inputs).logits
        layer.q_proj.register_forward_hook(lambda module, given, out: out + 1)
        after = model(**inputs).logits
        hf.revert()
        torch.testing.assert_close(after, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3
