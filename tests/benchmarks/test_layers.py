"""Whole-layer rows: the layer and the published form that it is timed against obey the rule of accuracy, small."""

from __future__ import annotations

import pytest
import torch

from benchmarks import layers
from benchmarks.wanted import Wanted, table
from mmkernels.primitives import _accuracy as accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image", [0, 6])
def test_the_layer_obeys_the_accuracy_rule(dtype, image):
    (room,) = layers.ROOMS
    inputs = room.make(
        seed=1, dtype=dtype, device="cpu", tokens=11, image=image, width=16, heads=2, hidden=24
    )
    fresh = accuracy.leaves(inputs, room)
    ours = accuracy.results(room, fresh, lambda: room.call(fresh))
    excess, name = accuracy.worst_excess(ours, accuracy.eager(room, inputs), accuracy.exact(room, inputs))
    assert excess <= 1, name
    unused = [n for n in ours if ".vision." in n]
    assert len(unused) == 4 and all(bool(ours[n].any()) == bool(image) for n in unused)


def test_layers_are_asked_for_by_name():
    found = table(Wanted(ops=("visual_expert_block",), dtypes=("float32",)))
    assert [case.name for _, case, _ in found] == [
        "cogvlm-layer-224",
        "cogvlm-layer-490",
        "cogvlm-layer-text",
    ]
