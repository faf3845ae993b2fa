"""Which rows go where, read on the host: on CPU that waits for nobody. By numpy, whose calls cost a fifth of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Index = np.ndarray[Any, np.dtype[np.int64]]


class Piece(NamedTuple):
    """Kept rows [start, stop), all of one group, or (group -1) of several groups of few rows each."""

    group: int
    start: int
    stop: int


class Rows(NamedTuple):
    """The kept rows: those in a group that have a place in x and one in out. `at` is where they stand in group order, `read`
    and `write` those places; None: the first rows, in order."""

    counts: Index
    segments: Index | None
    used: int
    at: Index | None
    read: Index | None
    write: Index | None


def _clamped(counts: Tensor, m: int) -> Index:
    """No count is negative, and together they end with the m rows."""
    sizes = np.minimum(np.maximum(counts.numpy(), 0).cumsum(dtype=np.int64), m)
    sizes[1:] -= sizes[:-1].copy()
    return sizes


def _inside(index: Index | None, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if index is None:
        return np.True_  # type: ignore[return-value]
    return index.view(np.uint64) < size  # a negative one is larger than any size


def _kept(counts: Index, keep: Index) -> Index:
    """How many rows of every group are kept."""
    owner = np.repeat(np.arange(len(counts)), counts)[: len(keep)]
    return np.bincount(owner[keep[: len(owner)]], minlength=len(counts))


def plan(
    sizes: tuple[int, int],
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    segments: Tensor | None,
) -> Rows:
    """`sizes`: the rows of x and of out."""
    m = sizes[0] if gather is None else len(gather)
    groups, parts = _clamped(counts, m), None if segments is None else _clamped(segments, m)
    used = int(groups.sum())
    read, write = (i if i is None else i.numpy()[:used].astype(np.int64) for i in (gather, scatter))
    found = used <= min(sizes) or (gather is not None and scatter is not None)
    if found and _inside(read, sizes[0]).all() and _inside(write, sizes[1]).all():
        return Rows(groups, parts, used, None, read, write)
    keep, each = np.ones(used, dtype=bool), np.arange(used)
    for index, size in ((read, sizes[0]), (write, sizes[1])):
        index = each if index is None else index
        keep &= _inside(index, size)
    at = each[keep]
    read, write = (at if i is None else i[keep] for i in (read, write))
    parts = None if parts is None else _kept(parts, keep)
    return Rows(_kept(groups, keep), parts, len(at), at, read, write)


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


def place(index: Index | None, start: int, stop: int) -> slice | Tensor:
    """Rows [start, stop) of the index, as a slice where they are one run."""
    if index is None:
        return slice(start, stop)
    index = index[start:stop]
    first, n = int(index[0]), stop - start
    run = int(index[-1]) - first == n - 1 and (n < 3 or bool((np.diff(index) == 1).all()))
    return slice(first, first + n) if run else torch.from_numpy(index)


def parts(counts: Index, start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """The groups (or segments) that rows [start, stop) belong to, each with its rows counted from `start`."""
    at = 0
    for group, count in enumerate(counts.tolist()):
        low, at = max(at, start), at + count
        if low < min(at, stop):
            yield group, slice(low - start, min(at, stop) - start)
