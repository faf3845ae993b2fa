"""Registers what serves CPUs: library products around the compiled kernel for groups of few rows."""

from __future__ import annotations

import functools

import torch

from mmkernels.primitives.grouped_linear import composed, composed_backward, op


@functools.cache  # asked at every call; modules are loaded before their operators are registered
def _present() -> str:
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{composed.KERNEL}", "CPU")
    return "" if found else f"{composed.KERNEL} is not compiled in this installation"


op.FORWARD.register("cpu", "cpp", composed.forward, present=_present)
op.BACKWARD.register("cpu", "cpp", composed_backward.backward, present=_present)
