"""Timing and memory: interleaved in one process, medians, nothing averaged away."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], object]
_FLUSH_BYTES = 64 << 20  # more than an L2 cache holds


@dataclass(frozen=True)
class Machine:
    """What this machine reached in this run: the floor of every row is made of these two rates."""

    flops: dict[str, float]
    bytes: float


def _seconds(function: Function, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.empty(
        _FLUSH_BYTES, dtype=torch.int8, device=device
    ).zero_()  # a cold L2: layers do not meet a warm one
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(functions: Mapping[str, Function], device: str, budget: float) -> dict[str, list[float]]:
    """Seconds of each function, A-B-A-B, for about `budget` seconds; slow peers drop out after three rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(times["ours"]) < 5:
        for name, function in functions.items():
            slow = len(times[name]) >= 3 and times[name][-1] > budget / 10
            if not slow or len(times["ours"]) < 3:
                times[name].append(_seconds(function, device))
        if len(times["ours"]) >= 200:
            break
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80 in milliseconds."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return 1e3 * ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {"median": 1e3 * statistics.median(seconds), "p20": at(0.2), "p80": at(0.8)}


def ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    """How many times longer the peer takes: medians, and the p20 of the ratios of neighbouring runs."""
    pairs = sorted(a / b for a, b in zip(peer, ours, strict=False))
    return {"median": statistics.median(peer) / statistics.median(ours), "p20": pairs[len(pairs) // 5]}


def spread(seconds: list[float]) -> float:
    """Ours against itself: the median of odd runs over the median of even ones, as a distance from 1."""
    if len(seconds) < 4:
        return 0.0
    return abs(statistics.median(seconds[::2]) / statistics.median(seconds[1::2]) - 1)


def extra_bytes(function: Function, device: str) -> int:
    """Peak of what one call holds beyond what it started with, its results included."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def probe(device: str) -> Machine:
    """Products of 1024 x 1024 in each dtype, and a copy of 64 MiB: the rates that the floors assume."""
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 1024, device=device).to(dtype)
        best = min(_seconds(lambda a=a: torch.mm(a, a), device) for _ in range(12))
        flops[str(dtype).removeprefix("torch.")] = 2 * 1024**3 / best
    x = torch.empty(16 << 20, device=device)
    y = torch.empty_like(x)
    best = min(_seconds(lambda: y.copy_(x), device) for _ in range(12))
    # a CPU without bfloat16 units computes in float32, and so do we: its floor is float32's
    flops["bfloat16"] = max(flops["bfloat16"], flops["float32"]) if device == "cpu" else flops["bfloat16"]
    return Machine(flops, 2 * x.nbytes / best)


def load() -> float:
    """Processes that wanted a core over the last minute, for each core there is."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)
