"""Named ranges for profilers: one for each op that runs, in the NVTX domain `mmkernels`, when MMKERNELS_NVTX=1.

They open below `torch.compile`, which therefore never sees them, and cost one attribute read while they are off.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

DOMAIN = "mmkernels"


def _profiler() -> ModuleType | None:
    """The nvtx package, when ranges are wanted and it is there."""
    if os.environ.get("MMKERNELS_NVTX", "0") != "1":
        return None
    try:
        return importlib.import_module("nvtx")
    except ImportError:
        warnings.warn(
            "MMKERNELS_NVTX=1 has no effect: the nvtx package is missing (pip install nvtx)", stacklevel=2
        )
        return None


nvtx = _profiler()


def call(op: str, backend: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """`function(*args)` inside a range, if ranges are on."""
    if nvtx is None:
        return function(*args)
    nvtx.push_range(f"{op} {backend} {_shapes(args)}", domain=DOMAIN)
    try:
        return function(*args)
    finally:
        nvtx.pop_range(domain=DOMAIN)


def _shapes(args: tuple[Any, ...]) -> str:
    return " ".join(
        f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" for a in args if isinstance(a, torch.Tensor)
    )
