"""Inputs for flamingo-tiny, written as text."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE, CHUNK, END, PAD = 2, 3, 1, 0


def text_ids(*rows: str) -> Tensor:
    """One id per letter: I an image, C the end of a chunk, E of the text, . padding, others text."""
    special = {"I": IMAGE, "C": CHUNK, "E": END, ".": PAD}
    return torch.tensor([[special.get(c, ord(c)) for c in row] for row in rows])


def pictures(batch: int, images: int, *frames: int) -> Tensor:
    return torch.randn(batch, images, *frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))
