"""Patched Hugging Face models against themselves: outputs and every gradient within the accuracy rule, 20 steps of training."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.hf_models import VARIANTS, Sizes
from benchmarks.hf_more_models import ALL
from mmkernels.integrations import hf
from mmkernels.integrations.hf import _attention, _experts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # theirs, of one version or another
MAKERS = ALL | VARIANTS
# calls that take torch's attention for want of ours
HIDDEN = "gradients of rows whose additive mask hides every key"
EXACT = {"idefics_holes": {HIDDEN}, "idefics_qk_norm": {HIDDEN}}


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


def _seen(inputs, logits):
    """Positions that are text: what stands at padding is nobody's."""
    mask = inputs["attention_mask"]
    return mask.bool() if mask.shape == logits.shape[:2] else torch.ones(logits.shape[:2], dtype=torch.bool)


def _results(model, inputs):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits = logits[_seen(inputs, logits)]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits * weight.to(logits)).sum().backward()
    grads = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().double(), **grads}


def _wide(model, inputs):
    """The unpatched model in float64, experts by its own loop (torch's grouped product knows no float64)."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation_internal", None):
            module.config._experts_implementation_internal = "eager"
    return model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_outputs_and_gradients(name):
    model, inputs = MAKERS[name](Sizes())
    theirs, exact = _results(model, inputs), _results(*_wide(model, inputs))
    assert hf.patch(model)
    ours = _results(model, inputs)
    assert set(hf.explain()) <= EXACT.get(name, set())
    assert ours.keys() == theirs.keys() == exact.keys()
    # a whole model away, eager's error is one draw that may be lucky, and gradients may cancel (a key's bias: exactly 0): the
    # rounding step is 8 of the model's largest gradient
    largest = max(float(g.abs().max()) for n, g in exact.items() if n != "logits")
    for part, value in exact.items():
        size = float(value.abs().max()) if part == "logits" else 8 * largest
        allowed = 2 * (theirs[part] - value).abs().max() + torch.finfo(torch.float32).eps * size
        assert (ours[part] - value).abs().max() <= allowed, part


@pytest.mark.parametrize("name", ["idefics", "mllama", "llava_next", "qwen2_vl", "mixtral", "aria"])
def test_twenty_steps_of_training(name):
    """The curves part by what float32 parts two summation orders: both stay as near to float64's curve."""
    model, inputs = MAKERS[name](Sizes())
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[labels >= 58] = -100  # places of images
    labels[:, 1:][
        ~inputs["attention_mask"][:, :-1].bool()
    ] = -100  # what padding would say of the first token
    curves = {}
    for who in ("theirs", "ours", "exact"):
        pupil, x = _wide(model, inputs) if who == "exact" else (copy.deepcopy(model), inputs)
        if who == "ours":
            hf.patch(pupil)
        learn = torch.optim.SGD(pupil.parameters(), lr=0.02, momentum=0.9)
        pupil.train()
        curve = []
        for _ in range(20):
            loss = pupil(**x, labels=labels, use_cache=False).loss
            learn.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
            learn.step()
            curve.append(loss.item())
        curves[who] = torch.tensor(curve, dtype=torch.float64)
    assert curves["theirs"][-1] < 0.8 * curves["theirs"][0]
    apart = (curves["theirs"] - curves["exact"]).abs().max()
    assert (curves["ours"] - curves["exact"]).abs().max() <= 2 * apart + 1e-5
