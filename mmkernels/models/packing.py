"""Prompts of unequal length without their padding: all tokens of a batch as one row, each seeing its own sequence."""

from __future__ import annotations

from torch import Tensor

from mmkernels.layers.attention import KVCache, Visibility

WORTH = 0.9  # packed where at most this share of a padded batch is tokens: below, the copies cost more than they save


class PackedPrompts:
    """Where the N tokens of a batch padded on the left stand, and the cache as its layers write it: keys and values go to
    their sequences, and attention reads the packed ones.
    """

    def __init__(self, mask: Tensor, cache: KVCache) -> None:
        b, t = mask.shape
        counts = mask.sum(1)
        self.index = mask.flatten().nonzero().squeeze(1)
        self.last = counts.cumsum(0) - 1
        row, column = self.index // t, self.index % t
        self.cache, self.slots = cache, row * cache.capacity + column
        # how far a sequence's positions move from its padded row to the packed one
        self.shift = (counts.cumsum(0) - t)[row].int()
        self.shape = (b, t)

    @classmethod
    def of(cls, mask: Tensor | None, cache: KVCache | None) -> PackedPrompts | None:
        """None where nothing is gained: no cache to fill, no mask, or hardly any padding."""
        if cache is None or cache.length or mask is None:
            return None
        counts = mask.sum(
            1
        ).tolist()  # here, and where the tokens are looked up, the host waits: once a prompt
        return cls(mask, cache) if all(counts) and sum(counts) <= WORTH * mask.numel() else None

    def rows(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[1, N, ...]`."""
        return x.flatten(0, 1)[self.index].unsqueeze(0)

    def seen(self, seen: Visibility) -> Visibility:
        """The same keys for every token, counted in the packed row."""
        rotary = None if seen.rotary is None else tuple(map(self.rows, seen.rotary))
        lo, hi = ((self.rows(x) + self.shift).int() for x in (seen.lo, seen.hi))
        return seen._replace(lo=lo, hi=hi, rotary=rotary)

    def ends(self, x: Tensor) -> Tensor:
        """The last token of every sequence: `[1, N, C]` -> `[B, 1, C]`."""
        return x[0, self.last].unsqueeze(1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`, for keys and values `[1, N, G, D]`."""
        if self.shape[0] != self.cache.k.shape[1] or self.shape[1] > self.cache.capacity:
            raise ValueError(
                f"cache: got {self.shape[0]} rows of {self.shape[1]} tokens, expected {self.cache.k.shape[1]} rows of at most "
                f"{self.cache.capacity}"
            )
        for store, new in ((self.cache.k, k), (self.cache.v, v)):
            store[layer].view(-1, *new.shape[2:])[self.slots] = new[0]
        return k, v
