"""The machine under the benchmark: who it is, and who else is using it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import significant
from mmkernels import _native, _version

ROOT = Path(__file__).parents[1]
BUSY = 0.25  # cores taken by others above which a measurement is marked


def name(device: str) -> str:
    """What the results are filed under: the processor, and on CPU the kernels' instruction set and the threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    isa = _native.host.isa() if _native.host is not None else torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {isa.lower()}, {torch.get_num_threads()} threads"


def slug(device: str) -> str:
    """The name as a folder's: `intel-xeon-processor-avx512-2-threads`."""
    plain = re.sub(r"\((R|TM|C)\)|CPU|@.*GHz", "", name(device), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def describe(device: str) -> dict[str, Any]:
    """Who measured: goes into the record as it is."""
    found: dict[str, Any] = {
        "device": name(device),
        "versions": {
            "mmkernels": _version.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "git": _git(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        found["versions"]["cuda"] = torch.version.cuda
        found["gpu"] = _first_line(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        )
    return found


def _git() -> str:
    """The commit, marked when what ran was not exactly it."""
    dirty = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return _first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""


class Neighbours:
    """How many cores other processes (and the hypervisor) took since this was made; None where the system does not say."""

    def __init__(self) -> None:
        self._begun = (time.perf_counter(), _busy(), _own())

    def cores(self) -> float | None:
        start, busy, own = self._begun
        now = _busy()
        if busy is None or now is None:
            return None
        return significant(max(0.0, (now - busy - (_own() - own)) / (time.perf_counter() - start)), 2)


def _own() -> float:
    mine = os.times()
    return mine.user + mine.system + mine.children_user + mine.children_system


def _busy() -> float | None:
    """Seconds that all cores together were not idle."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def run_queue() -> float:
    """The load average over the last minute."""
    return significant(os.getloadavg()[0], 3)
