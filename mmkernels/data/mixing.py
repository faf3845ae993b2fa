"""From which of several datasets the next batch comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def square_root(sizes: Mapping[str, float]) -> dict[str, float]:
    """`p_d = sqrt(S_d) / sum_i sqrt(S_i)`: small sets are seen more often than their share, large ones less.

    **Raises** ValueError for no sets and for sizes below 0 or all 0. **Source** InstructBLIP (arXiv 2305.06500).
    """
    _check(sizes, "sizes")
    return explicit({name: size**0.5 for name, size in sizes.items()})


def explicit(ratios: Mapping[str, float]) -> dict[str, float]:
    """Given ratios, made to sum to 1. **Raises** ValueError for none, and for ratios below 0 or all 0."""
    _check(ratios, "ratios")
    total = sum(ratios.values())
    return {name: ratio / total for name, ratio in ratios.items()}


def capped(sizes: Mapping[str, float], most: float = 50_000) -> dict[str, float]:
    """Shares by size, where no set counts as more than `most`: a large one does not crowd out the small ones.

    **Raises** ValueError for no sets, for sizes below 0 or all 0, and for a cap that is not above 0. **Source** Yi-VL's third
    stage (arXiv 2403.04652), 50,000 pairs a source.
    """
    if not most > 0:
        raise ValueError(f"most: got {most}, expected a number above 0")
    _check(sizes, "sizes")
    return explicit({name: min(size, most) for name, size in sizes.items()})


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """Given shares, which must add up to 1. **Raises** ValueError for none, for shares below 0, and for another sum."""
    _check(parts, "shares")
    total = sum(parts.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"shares: got {', '.join(map(repr, parts))} that add up to {total:g}, expected 1")
    return dict(parts)


def cap(sources: Sequence[str], limit: int, *, seed: int = 0) -> list[int]:
    """Which samples are kept when a source may give `limit` at most: all of a small one, a drawn subset of a large one.

    `sources[i]` names the source of sample i; returns indices in order, the same for the same seed whatever other sources hold.
    **Raises** ValueError for a limit below 1. **Source** Yi-VL (arXiv 2403.04652): 50,000 of the last stage's pairs.
    """
    if limit < 1:
        raise ValueError(f"limit: got {limit}, expected 1 or more")
    found: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        found.setdefault(source, []).append(index)
    kept: list[int] = []
    for source, indices in found.items():
        if len(indices) > limit:
            rng = np.random.default_rng((seed, *source.encode()))
            indices = [indices[i] for i in rng.choice(len(indices), limit, replace=False)]
        kept += indices
    return sorted(kept)


class Mixture:
    """Draws a set for every batch by fixed odds. Draws are numbered: draw `number` of a seed is always the same."""

    def __init__(self, odds: Mapping[str, float], *, seed: int = 0) -> None:
        self.odds, self.seed = explicit(odds), seed
        self._names = sorted(self.odds)
        self._ends = np.cumsum([self.odds[name] for name in self._names])

    def draw(self, number: int) -> str:
        """The set that batch `number` comes from."""
        point = np.random.default_rng((self.seed, number)).random() * self._ends[-1]
        return self._names[int(np.searchsorted(self._ends, point, side="right"))]


def _check(values: Mapping[str, float], what: str) -> None:
    wrong = [name for name, value in values.items() if not 0 <= value < float("inf")]
    if wrong or not any(values.values()):
        came = f"{wrong[0]!r}: {values[wrong[0]]}" if wrong else dict(values)
        raise ValueError(f"{what}: got {came}, expected numbers of 0 or more, one above 0 at least")
