"""LaVIN in lower precisions, without pictures, and compiled."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmkernels import models


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_lower_precisions_train_and_generate(how):
    torch.manual_seed(0)
    narrow = torch.bfloat16 if how == "bfloat16" else torch.float32
    model: Any = models.build("lavin-tiny", dtype=narrow).train()
    assert {p.dtype for n, p in model.named_parameters() if "adapter" in n} == {torch.float32}
    model.stages()[-1].freeze(model)
    ids, mask = model.expand(torch.tensor([[2, 40, 41, 42], [40, 41, 42, 43]]))
    images = torch.randn(2, 1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model(images, ids, mask, torch.where(mask, ids, 0)).loss
        assert model.generate(images, ids, mask, max_new_tokens=2, stop=()).shape == (2, 2)
    loss.backward()
    loss = loss.detach()
    exact: Any = copy.deepcopy(model).float().eval()
    with torch.no_grad():
        expected = float(exact(images, ids, mask, torch.where(mask, ids, 0)).loss)
    assert loss.dtype == torch.float32 and abs(float(loss) - expected) < 0.02 * expected
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


def test_a_batch_without_pictures_reaches_all_parameters():
    """As ranks whose batches have some do: a black picture is read and counts nothing."""
    model: Any = models.build("lavin-tiny").train()
    ids, mask = model.expand(torch.tensor([[40, 41, 42]]))
    model(None, ids, mask, ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(
        p.grad.any()
        for n, p in model.named_parameters()
        if n.startswith(("vision", "adapter_proj")) and p.requires_grad
    )


@torch.no_grad()
def test_the_whole_pass_is_one_graph():
    tiny: Any = models.config("lavin-tiny")
    short = replace(tiny, vision=replace(tiny.vision, layers=1), lm=replace(tiny.lm, layers=1))
    model: Any = models.build(short).eval()
    ids, mask = model.expand(torch.tensor([[2, 40, 41, 42], [40, 41, 42, 43]]))
    images = torch.randn(2, 1, 3, 32, 32)
    graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(images, ids, mask).logits, model(images, ids, mask).logits)
