"""Operands of library products on CPU: 16-bit ones are widened where the CPU has no units for them."""

from __future__ import annotations

import torch
from torch import Tensor


def low_products_are_slow(device: torch.device) -> bool:
    """CPUs without bfloat16 units take bfloat16 and float16 products 4 to 10 times slower than float32 ones."""
    return device.type == "cpu" and not torch.cpu._is_amx_tile_supported()


def operand_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 and low_products_are_slow(x.device) else x.dtype


def operand(x: Tensor) -> Tensor:
    """A product's operand: widened where that is faster, which is more exact too."""
    return x.to(operand_dtype(x))
