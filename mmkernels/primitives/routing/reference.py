"""Routing, the law. Letters: R rows, E groups, T tiles.

    counts[e]  = how many rows have id e              offsets[e] = counts[0] + ... + counts[e - 1]
    inverse[r] = offsets[id[r]] + how many rows before r have the same id, -1 for a row of no group
    order[inverse[r]] = r, and -1 past the last row of a group
    tile t     = rows [tile_row, tile_row + tile) of group tile_group, ended by the group's end; group -1: no such tile

Static shapes, prefix sums over a one-hot form of at most _CELLS numbers at a time, no sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CELLS = 1 << 20


def tiles_bound(rows: int, num_groups: int, tile: int) -> int:
    """No split of the rows needs more tiles: every group has less than one that is not full."""
    return rows // tile + torch.sym_min(rows, num_groups)  # type: ignore[return-value]  # sizes may be symbols


def forward(groups: Tensor, num_groups: int, tile: int) -> tuple[Tensor, ...]:
    """counts [E], offsets [E+1], order [R], inverse [R], tile_group [T], tile_row [T], all int32."""
    r, int32 = groups.shape[0], {"dtype": torch.int32, "device": groups.device}
    each = torch.arange(num_groups, **int32)
    counts, ranks = torch.zeros(num_groups, **int32), []
    for ids in groups.split(max(1, _CELLS // num_groups)):
        one_hot = (ids.unsqueeze(1) == each).to(torch.int32)
        before = one_hot.cumsum(0, dtype=torch.int32) - one_hot + counts
        ranks.append((before * one_hot).sum(1, dtype=torch.int32))
        counts = counts + one_hot.sum(0, dtype=torch.int32)
    offsets = torch.zeros(num_groups + 1, **int32)
    offsets[1:] = counts.cumsum(0, dtype=torch.int32)
    some = (groups >= 0) & (groups < num_groups)
    place = offsets[groups.clamp(0, num_groups - 1).long()] + torch.cat(ranks)
    inverse = torch.where(some, place, -1)
    order = torch.full((r + 1,), -1, **int32)
    order = order.scatter(0, torch.where(some, place, r).long(), torch.arange(r, **int32))[:r]
    return counts, offsets, order.contiguous(), inverse, *tiles_of(counts, offsets, r, tile)


def tiles_of(counts: Tensor, offsets: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor]:
    """Group after group; past the last tile the group is -1 and the row the last one's end."""
    tiles = (counts + tile - 1) // tile
    ends = tiles.cumsum(0, dtype=torch.int32)
    t = torch.arange(tiles_bound(rows, len(counts), tile), dtype=torch.int32, device=counts.device)
    group = torch.searchsorted(ends, t, right=True)
    real, group = group < len(counts), group.clamp(max=len(counts) - 1)
    row = offsets[group] + (t - (ends - tiles)[group]) * tile
    return torch.where(real, group, -1).to(torch.int32), torch.where(real, row, offsets[-1]).to(torch.int32)
