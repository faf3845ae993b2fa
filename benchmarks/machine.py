"""The machine under the benchmark: who it is, how fast its products and copies are, and who else is using it."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import CudaClock, cpu_clock, significant
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


@functools.cache
def flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product: in float32, or in the lower dtype where the machine is faster in it."""
    best = product(device, torch.float32)
    return best if dtype == torch.float32 else max(best, product(device, dtype))


@functools.cache
def product(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the library's product in this very dtype."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: a @ b, device)


def bandwidth(device: str, moved: float) -> float:
    """Bytes a second of a copy that moves as many bytes (rounded up to a power of two): caches count, as they do for ops."""
    return _copy(device, max(1 << 16, 1 << (int(moved) - 1).bit_length()) if moved > 1 else 1 << 16)


@functools.cache
def _copy(device: str, moved: int) -> float:
    source = torch.ones(moved // 8, device=device)  # half is read, half is written
    target = torch.empty_like(source)
    return moved / _best(lambda: target.copy_(source), device)


def _best(function: Any, device: str) -> float:
    """Seconds of the best of several calls, the more the shorter they are: the machine at its fastest is the floor."""
    clock = cpu_clock if device == "cpu" else CudaClock(flush=False)
    function()
    once = clock(function, 1)
    return min(clock(function, 1) for _ in range(max(5, min(200, int(0.05 / max(once, 1e-6))))))


def rates(device: str, dtypes: list[torch.dtype]) -> dict[str, float]:
    """GFLOP/s and GB/s, for the record."""
    found = {
        f"{str(dtype).removeprefix('torch.')}_gflops": significant(product(device, dtype) / 1e9)
        for dtype in dtypes
    }
    for size in (1 << 20, 1 << 24, 1 << 28):
        found[f"copy_{size >> 20}mb_gbs"] = significant(bandwidth(device, size) / 1e9)
    return found


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
