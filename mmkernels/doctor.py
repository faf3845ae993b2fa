"""What this installation can do: versions, compiled modules, op x backend with a reason for every no, and a self-test."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from mmkernels import _native, _version, gpu
from mmkernels.primitives import _accuracy as accuracy
from mmkernels.primitives._op import OPS, using
from mmkernels.rooms import rooms

_PACKAGES = ("triton", "numpy", "pillow", "safetensors", "transformers", "flash-attn", "cupy-cuda13x")


def report() -> dict[str, Any]:
    """Everything `mmkernels doctor` shows; `problems` is empty on a sound installation."""
    tests = self_test()
    return {
        "versions": versions(),
        "devices": devices(),
        "build": _native.build_info(),
        "modules": dict(_native.reasons),
        "ops": {name: _backends(name) for name in sorted(OPS)},
        "self_test": tests,
        "problems": problems(tests),
    }


def versions() -> dict[str, str]:
    found = {
        "mmkernels": _version.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["nvcc"] = _first_line("nvcc", "--version", pick="release")
    found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _first_line(command: str, *options: str, pick: str = "") -> str:
    """The first line of a tool's answer that holds `pick`, or why there is none."""
    if shutil.which(command) is None:
        return "not found"
    answer = subprocess.run([command, *options], capture_output=True, text=True, timeout=20)
    lines = [line.strip() for line in answer.stdout.splitlines() if pick in line]
    return lines[0] if answer.returncode == 0 and lines else f"{command} failed"


def devices() -> dict[str, Any]:
    cpu = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    cpu["isa"] = os.environ.get("MMKERNELS_ISA") or "chosen by the CPU"
    if _native.host is not None:
        cpu["features"] = [name for name, there in _native.host.cpu_features().items() if there]
    return {"cpu": cpu, "gpus": gpu.names(), "why_no_gpu": gpu.why_none()}


def _backends(name: str) -> dict[str, dict[str, str]]:
    """device -> backend -> "" or why it cannot serve here."""
    found: dict[str, dict[str, str]] = {}
    for device, rows in OPS[name].rows.items():
        absent = gpu.why_none() if device == "cuda" else ""
        found[device] = {row.backend: absent or row.present() for row in rows}
    return found


def self_test(device: str = "cpu") -> dict[str, str]:
    """The first row of every room's table through the default backend: "" or what is wrong with it."""
    return {name: _test_room(name, device) for name in rooms()}


def _test_room(name: str, device: str) -> str:
    room = rooms()[name]
    try:
        inputs = room.make(seed=1, dtype=torch.float32, device=device, **room.tests[0].sizes)
        fresh = accuracy.leaves(inputs, room)
        ours = accuracy.results(room, fresh, lambda: room.call(fresh))
        with using("reference"):
            again = accuracy.leaves(inputs, room)
            law = accuracy.results(room, again, lambda: room.call(again))
    except Exception as error:  # whatever it is belongs into the report: a doctor does not fall ill
        return f"{type(error).__name__}: {error}"
    worst = max(float((ours[n] - law[n]).abs().max()) for n in ours if ours[n].numel())
    return "" if worst < 1e-3 else f"differs from its reference by {worst:.2g}"


def problems(tests: dict[str, str]) -> list[str]:
    """What somebody should mend: a failing self-test, or a module that was built and does not load."""
    found = [f"{name}: {why}" for name, why in tests.items() if why] + gpu.problems()
    built = _native.build_info()["modules"]
    for module, why in _native.reasons.items():
        expected = built.get(module, "absent") == "" and not (
            module == "_C_cuda" and torch.version.cuda is None
        )
        if why and expected:
            found.append(f"{module} was built but does not load: {why}")
    return found
