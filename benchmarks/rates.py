"""How fast the machine is at its best: the rates of its products and copies, which every floor stands on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import CudaClock, cpu_clock, significant


@functools.cache
def of(device: str) -> Rates:
    """The rates of a device, shared by all who ask in this process."""
    return Rates(device)


class Rates:
    """The best rates seen so far; each is measured when first asked for, and once more by `again`.

    A rate that somebody else's work disturbed would make a floor too high, so that rows pass it; the better of two moments
    minutes apart is what counts.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._best: dict[tuple[str, Any], float] = {}
        self._measure: dict[str, Callable[[Any], float]] = {"product": self._product, "copy": self._copy}

    def again(self) -> None:
        """Measures every rate that was asked for once more."""
        for key in list(self._best):
            self._best[key] = max(self._best[key], self._measure[key[0]](key[1]))

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large product: in float32, or in the lower dtype where the machine is faster in it."""
        return max(self.product(torch.float32), self.product(dtype))

    def product(self, dtype: torch.dtype) -> float:
        """FLOP/s of the library's product in this very dtype."""
        return self._get("product", dtype)

    def bandwidth(self, moved: float) -> float:
        """Bytes a second of a copy of as many bytes (rounded up to a power of two): caches count, as they do for ops."""
        return self._get("copy", max(1 << 16, 1 << (int(moved) - 1).bit_length()) if moved > 1 else 1 << 16)

    def record(self) -> dict[str, float]:
        """GFLOP/s and GB/s, for people."""
        products = {f"{_name(t)}_gflops": self.product(t) / 1e9 for t in (torch.float32, torch.bfloat16)}
        copies = {f"copy_{mib}mb_gbs": self.bandwidth(mib << 20) / 1e9 for mib in (1, 16, 256)}
        return {name: significant(rate) for name, rate in (products | copies).items()}

    def _get(self, what: str, size: Any) -> float:
        if (what, size) not in self._best:
            self._best[what, size] = self._measure[what](size)
        return self._best[what, size]

    def _product(self, dtype: torch.dtype) -> float:
        size = 8192 if self.device == "cuda" else 1536
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2.0 * size**3 / self._seconds(lambda: a @ b)

    def _copy(self, moved: int) -> float:
        source = torch.ones(moved // 8, device=self.device)  # half is read, half is written
        target = torch.empty_like(source)
        return moved / self._seconds(lambda: target.copy_(source))

    def _seconds(self, function: Callable[[], Any]) -> float:
        """The best of several calls, the more the shorter they are."""
        clock = cpu_clock if self.device == "cpu" else CudaClock(flush=False)
        function()
        once = clock(function, 1)
        return min(clock(function, 1) for _ in range(max(5, min(200, int(0.05 / max(once, 1e-6))))))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
