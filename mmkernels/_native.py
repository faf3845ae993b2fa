"""Loads the compiled modules, and remembers why one is not there. Nothing here is needed for correct results.

`_C_cpu` and `_C_cuda` register kernels with the dispatcher and hold no Python symbol; `_host` is an ordinary extension.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).parent


def build_info() -> dict[str, Any]:
    """What the build wrote down: `modules` (name -> "" or why it was not built), compilers, architectures, revision."""
    path = _HERE / "_build_info.json"
    if not path.is_file():
        return {"modules": dict.fromkeys(("_C_cpu", "_C_cuda", "_host"), "nothing was ever built here")}
    return json.loads(path.read_text())


def _load(name: str) -> str:
    """Loads a module of kernels; returns "" or the reason why it cannot serve."""
    path = _HERE / f"{name}.abi3.so"
    if not path.is_file():
        return build_info()["modules"][name] or f"{path.name} is missing; build again"
    if name == "_C_cuda" and (why := _other_cuda()):
        return why
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load in torch {torch.__version__}: {error}"
    return ""


def _other_cuda() -> str:
    """Why this torch cannot host what nvcc compiled ("" when it can): no CUDA, or another major version of it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    compiled, there = (version.partition(".")[0] for version in (build_info()["nvcc"], torch.version.cuda))
    return (
        ""
        if compiled == there
        else f"it was compiled for CUDA {compiled}, torch has CUDA {there}; build again"
    )


def _import_host() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mmkernels._host"), ""
    except ImportError as error:
        return None, build_info()["modules"]["_host"] or str(error)


host, _why_no_host = _import_host()
reasons = {"_C_cpu": _load("_C_cpu"), "_C_cuda": _load("_C_cuda"), "_host": _why_no_host}
