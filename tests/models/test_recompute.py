"""Blocks that compute again keep less, and every gradient keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmkernels import models

NAMES = (
    "flamingo-tiny",
    "blip2-tiny",
    "cogvlm-tiny",
    "lavin-tiny",
    "llava-1.5-tiny",
    "moe_llava-tiny",
    "qwen_vl-tiny",
)


def _results(name: str, recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    torch.manual_seed(0)
    model: Any = models.build(name).train()
    model.recompute = recompute
    stage = model.stages()[-1]
    side = stage.image_size or model.config.vision.image_size
    ids = torch.full((2, 20), 9)
    ids[:, 0] = model.tokens.image
    ids, mask = model.expand(ids)[:2]
    torch.manual_seed(1)  # dropout draws again what it drew
    output = model(torch.randn(2, 1, 3, side, side), ids, mask, labels=ids.clamp(min=0))
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.loss, grads, len(output.routings)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_keep_their_bits(name):
    loss, grads, routings = _results(name, False)
    again, found, repeated = _results(name, True)
    assert torch.equal(loss, again) and grads.keys() == found.keys() and routings == repeated
    assert all(torch.equal(grads[n], found[n]) for n in grads)


def _held(name: str, recompute: bool) -> int:
    """Bytes that are allocated in a forward pass and still held after it."""
    torch.manual_seed(0)
    model: Any = models.build(name).train().requires_grad_(True)
    model.recompute = recompute
    ids = torch.full((4, 200), 9)
    model(None, ids, labels=ids).loss.backward()  # whatever is allocated once
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss = model(None, ids, labels=ids).loss
    events: Any = profile.kineto_results.events()  # type: ignore[union-attr]
    assert loss.requires_grad
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


@pytest.mark.parametrize("name", ["flamingo-tiny", "llava-1.5-tiny"])
def test_less_is_kept(name):
    assert _held(name, True) < 0.6 * _held(name, False)
