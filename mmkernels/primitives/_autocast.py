"""`torch.autocast`, also asked about devices that know none: on "meta" it is off, and models tell their shapes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_WITHOUT = ("meta",)


def dtype(device: str) -> torch.dtype | None:
    """What autocast turns operands of products into on a device; None while it is off."""
    if device in _WITHOUT or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def off(device: str) -> AbstractContextManager[object]:
    """Switches it off."""
    return nullcontext() if device in _WITHOUT else torch.autocast(device, enabled=False)
