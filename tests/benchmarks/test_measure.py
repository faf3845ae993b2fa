"""How time is shared among functions that compete, and what floors stand on."""

from __future__ import annotations

import time

import torch

from benchmarks import measure, rates
from benchmarks.row import floor


def test_every_function_gets_its_share_and_an_obvious_loser_one_sample():
    costs = {"ours": 0.01, "near": 0.02, "far": 0.5}

    def clock(function, calls):
        return costs[function()]

    functions = {name: lambda n=name: n for name in costs}
    times = measure.interleave(functions, clock, seconds=1.0, rounds=20)
    taken = {name: sum(t is not None for t in samples) for name, samples in times.items()}
    assert taken == {"ours": 20, "near": 16, "far": 1}
    assert measure.ratio(times, "far", "ours").median == 50.0


def test_a_slow_peer_near_ours_keeps_its_samples():
    times = measure.interleave(
        {"ours": lambda: 1, "near": lambda: 2},
        lambda function, calls: float(function()),
        seconds=0.1,
        rounds=20,
    )
    assert [len([t for t in samples if t]) for samples in times.values()] == [3, 3]


def test_the_better_of_two_moments_counts():
    found = rates.Rates("cpu")
    busy = found._seconds
    found._seconds = lambda function: 1e3 * busy(function)  # type: ignore[method-assign]
    slow = found.bandwidth(1 << 20)
    found._seconds = busy  # type: ignore[method-assign]
    found.again()
    assert found.bandwidth(1 << 20) > 10 * slow
    fast = found.bandwidth(1 << 20)
    found._seconds = lambda function: time.sleep(0) or 1e9  # type: ignore[method-assign]
    found.again()
    assert found.bandwidth(1 << 20) == fast


def test_a_floor_is_the_slower_of_products_and_copies(monkeypatch):
    best = rates.Rates("cpu")
    best._best = {("product", torch.float32): 1e9, ("copy", 1 << 20): 1e9}
    monkeypatch.setattr(rates, "of", lambda device: best)
    row = {"dtype": "float32", "flops": 4e6, "bytes": float(1 << 20), "ms": {"median": 8.0}}
    assert floor(row, "cpu") == {"floor_ms": 4.0, "share_of_floor": 0.5}
    assert floor(row | {"flops": 1e3}, "cpu")["floor_ms"] == 1.049
    assert floor({"dtype": "float32"}, "cpu") == {}
