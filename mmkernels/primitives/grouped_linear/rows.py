"""Which rows go where, read on the host: on CPU that waits for nobody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Kept rows [start, stop), all of one group, or (group -1) of several groups of few rows each."""

    group: int
    start: int
    stop: int


class Rows(NamedTuple):
    """The kept rows: those in a group that have a place in x and one in out. `at` is where they stand in group order, `read`
    and `write` those places; None: the first rows, in order."""

    counts: Tensor
    segments: Tensor | None
    used: int
    at: Tensor | None
    read: Tensor | None
    write: Tensor | None


def _clamped(counts: Tensor, m: int) -> Tensor:
    """No count is negative, and together they end with the m rows."""
    ends = counts.long().clamp(min=0).cumsum(0).clamp(max=m)
    return ends.diff(prepend=ends.new_zeros(1))


def _kept(counts: Tensor, keep: Tensor) -> Tensor:
    """How many rows of every group are kept."""
    owner = torch.repeat_interleave(counts)[: len(keep)]
    return torch.bincount(owner[keep[: len(owner)]], minlength=len(counts))


def plan(
    sizes: tuple[int, int],
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    segments: Tensor | None,
) -> Rows:
    """`sizes`: the rows of x and of out."""
    m = sizes[0] if gather is None else len(gather)
    counts = _clamped(counts, m)
    segments = None if segments is None else _clamped(segments, m)
    used = int(counts.sum())
    each = torch.arange(used)
    read, write = (i if i is None else i[:used].long() for i in (gather, scatter))
    keep = torch.ones(used, dtype=torch.bool)
    for index, size in ((read, sizes[0]), (write, sizes[1])):
        index = each if index is None else index
        keep &= (index >= 0) & (index < size)
    if bool(keep.all()):
        return Rows(counts, segments, used, None, read, write)
    segments = None if segments is None else _kept(segments, keep)
    at = each[keep]
    read, write = (at if i is None else i[keep] for i in (read, write))
    return Rows(_kept(counts, keep), segments, len(at), at, read, write)


def pieces(rows: Rows, few: int, chunk: int) -> Iterator[Piece]:
    """Groups of more than `few` rows in chunks; neighbours of fewer together."""
    at = start = 0
    for group, count in enumerate(rows.counts.tolist()):
        many = count > few
        if start < at and (many or at - start > chunk):
            yield Piece(-1, start, at)
            start = at
        at += count
        if many:
            yield from (Piece(group, i, min(i + chunk, at)) for i in range(start, at, chunk))
            start = at
    if start < at:
        yield Piece(-1, start, at)


def place(index: Tensor | None, start: int, stop: int) -> slice | Tensor:
    """Rows [start, stop) of the index, as a slice where they are one run."""
    if index is None:
        return slice(start, stop)
    index = index[start:stop]
    first, n = int(index[0]), stop - start
    run = int(index[-1]) - first == n - 1 and (n < 3 or bool((index.diff() == 1).all()))
    return slice(first, first + n) if run else index


def parts(counts: Tensor, start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """The groups (or segments) that rows [start, stop) belong to, each with its rows counted from `start`."""
    at = 0
    for group, count in enumerate(counts.tolist()):
        low, at = max(at, start), at + count
        if low < min(at, stop):
            yield group, slice(low - start, min(at, stop) - start)
