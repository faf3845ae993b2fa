"""The model that the tests of a whole Flamingo share."""

from __future__ import annotations

import pytest
import torch

from mmkernels import models


@pytest.fixture(scope="module")
def model() -> models.Flamingo:
    """flamingo-tiny with open gates: what it sees shows."""
    torch.manual_seed(0)
    model = models.build("flamingo-tiny")
    with torch.no_grad():
        for block in model.cross:
            block.attention_gate.fill_(1.0)
            block.ffn_gate.fill_(0.5)
    return model.eval()
