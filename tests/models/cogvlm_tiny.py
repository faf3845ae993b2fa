"""cogvlm-tiny and its inputs, written as text."""

from __future__ import annotations

import torch

from mmkernels import models

PLACES = 38
IMAGE = "I" * PLACES


def ids(*rows: str) -> torch.Tensor:
    """One id per letter: I a place of an image, E the beginning and the end of a text, . padding, others text."""
    special = {"I": 2, "E": 1, ".": 0}
    longest = max(map(len, rows))
    return torch.tensor([[special.get(c, ord(c)) for c in row.ljust(longest, ".")] for row in rows])


def pictures(batch: int, images: int = 1) -> torch.Tensor:
    return torch.randn(batch, images, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def grown() -> models.CogVLM:
    """cogvlm-tiny whose experts have gone their own way."""
    torch.manual_seed(0)
    model = models.build("cogvlm-tiny")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".vision." in name or name.startswith("projector."):
                p.add_(torch.randn_like(p) * 0.05)
    return model.eval()
