"""Time and memory of functions that compete: interleaved in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[[], Any]
Times = dict[str, list[float | None]]  # seconds a call, one entry a round; None where the function sat out

SHORT = 5e-3  # functions below this are warmed before every sample and timed over several calls
SAMPLE = 1e-3  # seconds that a sample of a short function lasts at least
FEWEST = 3  # samples of a slow function
OBVIOUS = 8  # times slower than the first function: one sample says it


class Clock(Protocol):
    def __call__(self, function: Function, calls: int) -> float:
        """Seconds a call."""
        ...


def cpu_clock(function: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


class CudaClock:
    """Device time by events; before each call a write larger than the L2 cache evicts it."""

    FLUSH = 256 << 20

    def __init__(self, *, flush: bool = True) -> None:
        self.flush = torch.empty(self.FLUSH if flush else 0, dtype=torch.int8, device="cuda")

    def __call__(self, function: Function, calls: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3


def clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else cpu_clock


def interleave(functions: dict[str, Function], clock: Clock, *, seconds: float, rounds: int) -> Times:
    """Times all functions, called before, in turn, each round starting with another one, within about `seconds` altogether.

    A slow function takes part in fewer rounds, spread evenly, but in at least FEWEST, or in one where it is OBVIOUS times
    slower than the first; the first function, whose time all ratios share, in every round.
    """
    first = {name: clock(function, 1) for name, function in functions.items()}
    share = seconds / len(functions)
    ours = next(iter(functions))
    least = {name: FEWEST if cost < OBVIOUS * first[ours] else 1 for name, cost in first.items()}
    takes = {
        name: max(least[name], min(rounds, int(share / _sample_cost(first[name])))) for name in functions
    }
    rounds = takes[ours]
    calls = {name: _calls(first[name]) for name in functions}
    times: Times = {name: [] for name in functions}
    order = list(functions)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if turn * takes[name] % rounds >= min(takes[name], rounds):
                times[name].append(None)
                continue
            if first[name] < SHORT:
                functions[name]()
            times[name].append(clock(functions[name], calls[name]))
    return times


def _calls(seconds: float) -> int:
    return 1 if seconds >= SAMPLE else min(100, math.ceil(SAMPLE / max(seconds, 1e-7)))


def _sample_cost(seconds: float) -> float:
    return max(1e-7, seconds * (_calls(seconds) + (seconds < SHORT)))


@dataclass(frozen=True)
class Spread:
    """What is kept of many samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float], scale: float = 1.0) -> Spread:
        low, high = _percentile(samples, 0.2), _percentile(samples, 0.8)
        return cls(*(scale * value for value in (statistics.median(samples), low, high)))

    def rounded(self) -> dict[str, float]:
        return {name: significant(getattr(self, name)) for name in ("median", "p20", "p80")}


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _percentile(samples: list[float], share: float) -> float:
    """Linear between neighbours, as everybody's percentiles are."""
    ordered, at = sorted(samples), share * (len(samples) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spread(times: Times, name: str) -> Spread:
    """Milliseconds."""
    return Spread.of([t for t in times[name] if t is not None], 1e3)


def ratio(times: Times, peer: str, ours: str) -> Spread:
    """peer / ours, round by round, where both were timed."""
    pairs = zip(times[peer], times[ours], strict=True)
    return Spread.of([p / o for p, o in pairs if p is not None and o is not None])


def extra_bytes(function: Function, device: str) -> int:
    """Peak memory of one call beyond what was there before and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = _bytes(function())
        return max(0, torch.cuda.max_memory_allocated() - before - kept)
    with _quiet_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = _bytes(function())
    events: list[Any] = profile.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in moves:
        held += size
        peak = max(peak, held)
    return max(0, peak - kept)


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler announces its start and stop on standard error, from C++."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def graph_seconds(function: Function, replays: int = 20) -> float:
    """CUDA: seconds a call inside a replayed graph of `replays` calls, without any launch from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(replays):
            function()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / replays)
    return statistics.median(times)
