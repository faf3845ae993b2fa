"""Routing: schema and public function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.primitives import _check
from mmkernels.primitives._op import Op
from mmkernels.primitives.routing import reference


class Groups(NamedTuple):
    """Where the rows of every group are: `counts` and `order` are what `grouped_linear` takes."""

    counts: Tensor
    offsets: Tensor
    order: Tensor
    inverse: Tensor
    tile_group: Tensor
    tile_row: Tensor


def _fake(groups: Tensor, num_groups: int, tile: int) -> tuple[Tensor, ...]:
    r = groups.shape[0]
    tiles = reference.tiles_bound(r, num_groups, tile)
    sizes = (num_groups, num_groups + 1, r, r, tiles, tiles)
    return tuple(groups.new_empty(n, dtype=torch.int32) for n in sizes)


def _check_groups(groups: Tensor, num_groups: int, tile: int) -> None:
    wrong = (groups < 0) | (groups > num_groups)
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"groups: row {row} has group {int(groups[row])}, expected 0 to {num_groups - 1}, or {num_groups} for none"
        )


OP = Op(
    "route_groups(Tensor groups, int num_groups, int tile) -> (Tensor counts, Tensor offsets, Tensor order, "
    "Tensor inverse, Tensor tile_group, Tensor tile_row)",
    reference.forward,
    fake=_fake,
    check=_check_groups,
)
OP.compiled("cpp")


def route_groups(groups: Tensor, num_groups: int = 2, *, tile: int = 128) -> Groups:
    """Sorts rows by their group, keeping their order within it, without a sort and without the host.

    `inverse[r] = offsets[g] + |{s < r: groups[s] = g}|` with g = groups[r], `order[inverse[r]] = r`.

    **Shapes** groups `[R]`, each from 0 to `num_groups - 1`, or `num_groups` for a row of no group; bool is False 0, True 1.
    Returns counts `[E]`, offsets `[E + 1]`, order and inverse `[R]` (-1: past the last row of a group, a row of no group), and
    the tiles of at most `tile` rows of one group, `tile_group` and `tile_row` (its first place in order), both
    `[R // tile + min(R, E)]`: as many as any split of the rows can need, group -1 where this one needs fewer.
    **Dtypes** groups int32 or bool; all results int32. **Gradient** none.
    **Edge** all rows in one group, no rows, and empty groups are ordinary; memory beside the results never grows as R E.
    **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for a group below 0 or above `num_groups`;
    TypeError for dtypes. Kernels take such a row as one of no group.
    **Source** MegaBlocks (arXiv 2211.15841) section 5.2. **Speed** `mmkernels bench --op route_groups`.

    >>> g = route_groups(is_image)
    >>> y = grouped_linear(x, weight, g.counts, gather=g.order, scatter=g.order)
    """
    _check.shapes(groups=(groups, "R"))
    _check.dtypes((torch.int32, torch.bool), groups=groups)
    _check.positive(num_groups=num_groups, tile=tile)
    if groups.dtype == torch.bool and num_groups != 2:
        raise ValueError(f"num_groups: got {num_groups} with bool groups, expected 2")
    return Groups(*OP(groups.to(torch.int32), num_groups, tile))
