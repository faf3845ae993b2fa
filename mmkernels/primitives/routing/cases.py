"""Routing as data: ids of every kind of split, and what published code does to bring the rows of a group together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._case import Case, Cost, Inputs, Room, generator
from mmkernels.primitives.routing.op import Groups, route_groups

_SIZES: dict[str, Any] = {"rows": 50, "groups": 4, "split": "random", "tile": 16}


def _ids(z: dict[str, Any], random: torch.Generator, device: str) -> Tensor:
    rows, groups, split = z["rows"], z["groups"], z["split"]
    at = torch.arange(rows, device=device)
    if split == "random":  # the id `groups` is no group
        return torch.randint(0, groups + 1, (rows,), generator=random, device=device)
    if split == "skewed":
        return (groups * torch.rand(rows, generator=random, device=device) ** 4).long()
    if split == "one":
        return torch.full((rows,), groups - 1, device=device)
    if split == "none":
        return torch.full((rows,), groups, device=device)
    if split == "few":  # most groups are empty
        return at % 3 * (groups // 3)
    return ((at % 321 >= 1) & (at % 321 < 258)).long()  # images of 257 rows among 64 of text


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z = _SIZES | sizes
    ids = _ids(z, generator(seed, device), device).to(torch.int32)
    return {
        "groups": ids.bool() if z["split"] == "bool" else ids,
        "num_groups": z["groups"],
        "tile": z["tile"],
    }


def call(x: Inputs) -> Tensor:
    """All results as one vector, so that each is compared."""
    g: Groups = route_groups(x["groups"], x["num_groups"], tile=x["tile"])
    return torch.cat([g.order, g.inverse, g.counts, g.offsets, g.tile_group, g.tile_row])


def eager(x: Inputs) -> Callable[[], Tensor]:
    """A stable sort and a count, with the tiles in plain tensors: as published mixtures of experts do."""
    ids, groups, tile = x["groups"].long(), x["num_groups"], x["tile"]
    each = torch.arange(len(ids), device=ids.device)

    def run() -> Tensor:
        counts = torch.bincount(ids, minlength=groups + 1)[:groups]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order = torch.sort(ids, stable=True).indices
        inverse = torch.empty_like(order).index_put_((order,), each)
        order = torch.where(each < offsets[-1], order, -1)
        inverse = torch.where(ids < groups, inverse, -1)
        tiles = (counts + tile - 1) // tile
        group = torch.repeat_interleave(tiles)
        row = torch.arange(len(group), device=ids.device) - (tiles.cumsum(0) - tiles)[group]
        spare = len(ids) // tile + min(len(ids), groups) - len(group)
        row = torch.cat([offsets[group] + row * tile, offsets[-1:].expand(spare)])
        group = torch.cat([group, group.new_full((spare,), -1)])
        return torch.cat([order, inverse, counts, offsets, group, row]).int()

    return run


def cost(x: Inputs) -> Cost:
    return Cost(flops=float(len(x["groups"])), bytes=12.0 * len(x["groups"]))


def _test(name: str, **sizes: Any) -> Case:
    return Case(name, sizes, (torch.float32,))


TESTS = (
    _test("uneven", split="skewed"),
    _test("plain", groups=2),
    _test("bool", split="bool", groups=2, rows=700, tile=128),
    _test("one-group", groups=1),
    _test("three-groups", groups=3, rows=7),
    _test("100-groups", groups=100, rows=300),
    _test("512-groups", groups=512, rows=2500),
    _test("512-groups-few-used", groups=512, split="few"),
    _test("all-in-one", split="one", groups=60),
    _test("all-in-none", split="none"),
    _test("no-rows", rows=0, split="one"),
    _test("one-row", rows=1, split="one"),
    _test("more-groups-than-rows", rows=5, groups=300),
    _test("tiles-of-one", tile=1),
    _test("several-chunks", rows=9000, groups=256, split="skewed", tile=64),
)


def _bench(name: str, headline: bool = False, **sizes: Any) -> Case:
    return Case(name, {"tile": 128} | sizes, (torch.float32,), ("fwd",), headline)


BENCH = (
    _bench("cogvlm-224-b8", headline=True, rows=8 * 321, groups=2, split="image"),
    _bench("moe-llava-T5120", rows=10240, groups=4),
    _bench("128-experts-T8192-k8", rows=65536, groups=128, split="skewed"),
    _bench("512-experts-1M", rows=1 << 20, groups=512, split="skewed"),
)

ROOMS = (
    Room(
        name="route_groups",
        make=make,
        call=call,
        differentiable=(),
        tests=TESTS,
        bench=BENCH,
        cost=cost,
        peers={"eager": eager},
        ops=("route_groups",),
    ),
)
