"""A whole CogVLM layer in one graph, whatever the mix of modalities, and without the host reading a value."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from mmkernels.layers import VisualExpertBlock, image_positions

OPTIONS = {"kv_heads": 2, "vision_bias": True}


def _mix(number: int, length: int) -> torch.Tensor:
    """No image, images only, one that moves and grows, alternating tokens."""
    at = torch.arange(length).expand(2, length)
    if number < 2:
        return torch.full_like(at, number)
    return at % 2 if number == 2 else ((at >= number - 2) & (at < 2 * number)).long()


@pytest.mark.parametrize("lengths", [(12,), (12, 17, 23)], ids=["one-length", "lengths"])
def test_ten_mixes_take_two_compilations_at_most(lengths) -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    block = VisualExpertBlock(16, 4, 24, **OPTIONS)

    def step(x, types):
        return block(x, types, image_positions(types))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for number in range(10):
        types = _mix(number, lengths[number % len(lengths)])
        x = torch.randn(*types.shape, 16, requires_grad=True)
        grads = []
        for run in (step, compiled):
            y = run(x, types)
            grads.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a)
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_no_value_is_read_by_the_host() -> None:
    """Fake tensors have none: reading a count, or a size that follows from one, would raise."""
    with FakeTensorMode():
        block = VisualExpertBlock(16, 4, 24, **OPTIONS)
        x, types = torch.randn(2, 9, 16, requires_grad=True), torch.zeros(2, 9, dtype=torch.long)
        mask = torch.ones(2, 9, dtype=torch.bool)
        with pytest.raises(DynamicOutputShapeException):  # what published code would do
            x[types == 1]
        y, cache = block(x, types, image_positions(types, mask), key_mask=mask, return_cache=True)
        assert y.shape == x.shape and cache[0].shape == (2, 9, 2, 4)
        y.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in block.parameters())
        step = block(x[:, :1], types[:, :1], types[:, :1] + 9, cache=cache)
        assert step.shape == (2, 1, 16)
