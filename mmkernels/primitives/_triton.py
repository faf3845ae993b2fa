"""The host side that Triton rooms share: registration without importing triton, the device's size, pieces of launches."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._op import Op


@functools.cache
def missing(device: str) -> str:
    """Why Triton kernels cannot run on `device` ("" when they can). Imports nothing and starts no driver."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu":
        return (
            ""
            if os.environ.get("TRITON_INTERPRET") == "1"
            else "the interpreter is off: TRITON_INTERPRET is not 1"
        )
    return "" if torch.version.cuda else "this torch is built without CUDA"


def register(op: Op, module: str, name: str, supports: Callable[..., str]) -> None:
    """`module.name` becomes op's Triton kernel; the module is imported by the first call."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    for device in ("cuda", "cpu"):
        present = functools.partial(missing, device)
        op.register(device, "triton", call, supports=supports, present=present)


@functools.cache
def device_facts(index: int | None) -> tuple[int, int]:
    """(architecture such as 90, multiprocessors); on CPU, where only the interpreter runs, those of one H100 or H200."""
    if index is None:
        return 90, 132
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


def facts(tensor: Tensor) -> tuple[int, int]:
    return device_facts(tensor.device.index if tensor.is_cuda else None)


def refuses(tensor: Tensor) -> str:
    """Why Triton kernels do not take this tensor ("" when they do)."""
    if tensor.is_cuda:
        return "" if facts(tensor)[0] >= 80 else f"sm_{facts(tensor)[0]} is older than sm_80"
    return "the interpreter's bfloat16 products are wrong" if tensor.dtype == torch.bfloat16 else ""


def parts(width: int) -> tuple[int, ...]:
    """`width` as one power of two or two of them, at least 16 each, wasting the least: 72 -> (64, 16), 112 -> (128,)."""
    whole = max(16, 1 << (width - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << (width - half - 1).bit_length())
    return (half, rest) if half >= 16 and half < width and half + rest < whole else (whole,)


def unit_rows(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension, copied only if it has another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
