"""What the routing table cannot say: the laws of a permutation, bounded memory, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import grouped_linear, route_groups, using
from mmkernels.primitives._op import OPS
from mmkernels.primitives.routing import reference

BACKENDS = [
    row.backend for row in OPS["route_groups"].rows["cpu"] if not row.present() and row.backend != "triton"
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with using(request.param):
        yield request.param


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_an_example_by_hand(backend: str) -> None:
    g = route_groups(_int(2, 0, 2, 3, 0, 2), 3, tile=2)
    assert g.counts.tolist() == [2, 0, 3] and g.offsets.tolist() == [0, 2, 2, 5]
    assert g.order.tolist() == [1, 4, 0, 2, 5, -1] and g.inverse.tolist() == [2, 0, 3, -1, 1, 4]
    assert g.tile_group.tolist() == [0, 2, 2, -1, -1, -1] and g.tile_row.tolist() == [0, 2, 4, 5, 5, 5]
    assert all(x.dtype == torch.int32 for x in g)


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(ids=st.lists(st.integers(0, 7), max_size=60), tile=st.integers(1, 20))
def test_order_is_a_stable_bijection_and_tiles_cover_it(name: str, ids: list[int], tile: int) -> None:
    with using(name):
        g = route_groups(torch.tensor(ids, dtype=torch.int32), 7, tile=tile)
    used = int(g.offsets[-1])
    order = g.order[:used].tolist()
    assert order == sorted((r for r, i in enumerate(ids) if i < 7), key=lambda r: (ids[r], r))
    assert (g.order[used:] == -1).all()
    assert [int(g.inverse[r]) for r in order] == list(range(used))
    covered = []
    for group, row in zip(g.tile_group.tolist(), g.tile_row.tolist(), strict=True):
        if group >= 0:
            covered += [(group, r) for r in range(row, min(row + tile, int(g.offsets[group + 1])))]
    assert covered == [(ids[r], n) for n, r in enumerate(order)]


def test_bool_is_two_groups(backend: str) -> None:
    g = route_groups(torch.tensor([True, False, True]))
    assert g.counts.tolist() == [1, 2] and g.order.tolist() == [1, 0, 2]


def test_rows_of_wild_groups_are_ignored_by_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS["route_groups"], "_check", None)
    g = route_groups(_int(-1, 1, 9, 2**31 - 1, 0, -(2**31)), 2)
    assert g.counts.tolist() == [1, 1] and g.order.tolist() == [4, 1, -1, -1, -1, -1]
    assert g.inverse.tolist() == [-1, 1, -1, -1, 0, -1]


def test_a_million_rows_of_512_groups_stay_within_memory() -> None:
    """The one-hot form is cut: the largest tensor of the law stays far below R x E numbers."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.nbytes if isinstance(out, Tensor) else 0)
            return out

    ids = torch.randint(0, 512, (20_000,), dtype=torch.int32)
    with Largest():
        reference.forward(ids, 512, 128)
    assert 0 < largest <= 8 * reference._CELLS < 20_000 * 512


def test_a_million_rows(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the law is not quick")
    ids = torch.randint(0, 512, (1_000_000,), dtype=torch.int32)
    g = route_groups(ids, 512)
    assert torch.equal(g.counts.long(), torch.bincount(ids, minlength=512))
    assert torch.equal(g.order.long(), torch.sort(ids, stable=True).indices)


def test_rows_go_out_and_come_back(backend: str) -> None:
    ids = _int(*(i * 7 % 5 for i in range(23)))
    x, g = torch.randn(23, 6), route_groups(ids, 5)
    w = torch.eye(6).expand(5, 6, 6)
    assert torch.equal(grouped_linear(x, w, g.counts, gather=g.order, scatter=g.order), x)


_BAD = {
    "rank": ((torch.zeros(2, 2, dtype=torch.int32), 2), ValueError, r"groups: got shape \(2, 2\), expected 1 dim"),
    "dtype": ((torch.zeros(2), 2), TypeError, "groups: got torch.float32, expected torch.int32 or torch.bool"),
    "bool": ((torch.zeros(2, dtype=torch.bool), 3), ValueError, "num_groups: got 3 with bool groups, expected 2"),
    "none": ((_int(0), 0), ValueError, "num_groups: got 0, expected a positive"),
    "below": ((_int(0, -1), 3), ValueError, "groups: row 1 has group -1, expected 0 to 2, or 3 for none"),
    "above": ((_int(0, 1, 8), 3), ValueError, "groups: row 2 has group 8"),
}  # fmt: skip


@pytest.mark.parametrize("what", _BAD)
def test_bad_arguments_are_named(what: str) -> None:
    arguments, error, message = _BAD[what]
    with pytest.raises(error, match=message):
        route_groups(*arguments)
