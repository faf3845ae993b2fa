"""Packed slices: published interpolations, slices that do not know their neighbours, forms of positions, bad inputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels import (
    region_attention,
    region_pool,
    segment_lora,
    slice_attention,
    slice_offsets,
    slice_patch_embed,
    splice_embeddings,
    using,
)
from mmkernels.ops.sliced_image import pool_size
from mmkernels.ops.sliced_image.regions import POOLS, pool_sizes

COMPILED = pytest.mark.skipif(
    bool(mmkernels.backends()["slice_attention"]["cpp"]), reason="nothing is compiled"
)

HW = torch.tensor([[3, 5], [4, 4], [7, 2], [1, 1], [2, 9]])


def _stretched(table: Tensor, grid: tuple[int, int], **rule) -> Tensor:
    cells = F.interpolate(table.view(1, *grid, -1).permute(0, 3, 1, 2), **rule)
    return cells.permute(0, 2, 3, 1).flatten(0, 2)


def _positions(table: Tensor, hw: Tensor = HW, **rule) -> Tensor:
    patches = int(hw.prod(1).sum())
    zero = torch.zeros(patches, 2, dtype=table.dtype), torch.zeros(table.shape[1], 2, dtype=table.dtype)
    return slice_patch_embed(*zero, hw, positions=table, **rule)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("align_corners", "antialias"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (1, 1)])
def test_positions_are_those_of_interpolate(
    mode: str, align_corners: bool, antialias: bool, grid: tuple[int, int]
) -> None:
    table = torch.randn(math.prod(grid), 8, dtype=torch.float64)
    rule = {"mode": mode, "align_corners": align_corners, "antialias": antialias}
    want = torch.cat([_stretched(table, grid, size=tuple(hw), **rule) for hw in HW.tolist()])
    torch.testing.assert_close(_positions(table, grid=grid, **rule), want, rtol=0, atol=1e-12)


def test_a_scale_factor_moves_the_centres_as_dino_has_it() -> None:
    table, hw = torch.randn(16, 8, dtype=torch.float64), torch.tensor([[3, 5], [6, 4], [4, 4]])
    stretched = [
        _stretched(
            table, (4, 4), scale_factor=((h + 0.1) / 4, (w + 0.1) / 4), mode="bicubic", align_corners=False
        )
        for h, w in hw.tolist()[:2]
    ]
    want = torch.cat([*stretched, table])  # a slice of the table's size reads it as it is
    torch.testing.assert_close(_positions(table, hw, offset=0.1), want, rtol=0, atol=1e-12)


def test_prefix_rows_stand_before_every_slice() -> None:
    hw, patches = torch.tensor([[1, 2], [0, 3], [2, 2]]), torch.randn(6, 3)
    weight, prefix = torch.randn(4, 3), torch.randn(2, 4)
    out = slice_patch_embed(patches, weight, hw, prefix=prefix)
    rows = patches @ weight.T
    want = torch.cat([prefix, rows[:2], prefix, prefix, rows[2:]])
    torch.testing.assert_close(out, want)
    assert slice_offsets(hw, 2).tolist() == [0, 4, 6, 12]


def test_attention_knows_no_neighbour_and_takes_sizes_or_offsets() -> None:
    offsets = slice_offsets(HW, 1)
    q, k, v = torch.randn(3, int(offsets[-1]), 2, 8, dtype=torch.float64).unbind(0)
    out = slice_attention(q, k, v, HW, prefix=1)
    assert torch.equal(out, slice_attention(q, k, v, offsets))
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        rows = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*rows).transpose(0, 1)
        torch.testing.assert_close(out[start:stop], want, rtol=0, atol=1e-12)


def test_a_row_of_no_slices_is_no_row() -> None:
    none = torch.zeros(0, 2, 8, requires_grad=True)
    out = slice_attention(none, none, none, torch.zeros(0, 2, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 2, 8) and none.grad is not None


def test_lora_adds_each_rows_own_window() -> None:
    x, base = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    a, b = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    segment = torch.tensor([2, -1, 0, 0, 2, -1, 1])
    out = segment_lora(x, base, a, b, segment)
    for r, w in enumerate(segment.tolist()):
        want = base[r] if w < 0 else base[r] + b[w] @ (a[w] @ x[r])
        torch.testing.assert_close(out[r], want)
    assert torch.equal(out[segment < 0], base[segment < 0])


def test_lora_leaves_unused_windows_without_gradient() -> None:
    x, a, b = (torch.randn(s, requires_grad=True) for s in ((4, 6), (3, 2, 6), (3, 5, 2)))
    segment = torch.tensor([1, -1, 1, -1])
    segment_lora(x, torch.zeros(4, 5), a, b, segment).sum().backward()
    for grad in (a.grad, b.grad):
        assert grad is not None and not grad[[0, 2]].any() and grad[1].any()
    assert x.grad is not None and not x.grad[1].any()


def test_splicing_takes_rows_places_or_a_mask() -> None:
    text, visual = torch.randn(2, 5, 3), torch.randn(3, 3)
    rows = torch.tensor([[-1, 0, 1, -1, -1], [-1, -1, -1, 2, -1]])
    want = text.clone()
    want[0, 1], want[0, 2], want[1, 3] = visual
    places = torch.tensor([1, 2, 8])
    for positions in (rows, rows.int(), rows >= 0, places):
        assert torch.equal(splice_embeddings(text, visual, positions), want)
    packed = splice_embeddings(text.flatten(0, 1), visual, places)
    assert torch.equal(packed, want.flatten(0, 1))
    assert torch.equal(splice_embeddings(text, visual, torch.tensor([1, -1, 8]))[0, 2], text[0, 2])


def test_splicing_adds_the_gradients_of_a_row_used_twice() -> None:
    text, visual, newline = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 2, 1))
    positions = torch.tensor([-1, 1, -2, 1, -2, -1])
    weight = torch.randn(6, 3, dtype=torch.float64)
    (splice_embeddings(text, visual, positions, special=newline) * weight).sum().backward()
    torch.testing.assert_close(visual.grad, torch.stack([torch.zeros(3).double(), weight[1] + weight[3]]))
    torch.testing.assert_close(newline.grad, (weight[2] + weight[4])[None])
    torch.testing.assert_close(text.grad, torch.where((positions == -1)[:, None], weight, 0))


def test_boxes_are_cut_as_their_map_is_shaped() -> None:
    hw = torch.tensor([[h, w] for h in (1, 7, 12, 19, 43, 72) for w in (1, 7, 13, 24, 29, 72)])
    assert pool_sizes(hw).tolist() == [list(pool_size(w / h))[::-1] for h, w in hw.tolist()]
    assert [pool_size(ow / oh) for ow, oh in POOLS] == list(POOLS)


def test_each_query_reads_its_own_box() -> None:
    hw, grid = torch.tensor([[4, 6], [9, 2]]), 2
    k, v = torch.randn(2, 42, 2, 4, dtype=torch.float64).unbind(0)
    q = torch.randn(grid * grid, 2, 4, dtype=torch.float64)
    out = region_attention(q, k, v, hw, grid=grid)
    keys, values = (region_pool(t.flatten(1), hw, grid=grid).unflatten(-1, (2, 4)) for t in (k, v))
    for s in range(2):
        bins = math.prod(pool_size(int(hw[s, 1]) / int(hw[s, 0])))
        scores = torch.einsum("nhd,nkhd->nhk", q, keys[s, :, :bins]) / 2
        want = torch.einsum("nhk,nkhd->nhd", scores.softmax(-1), values[s, :, :bins])
        torch.testing.assert_close(out[s], want)


_P, _W = torch.randn(6, 3), torch.randn(4, 3)
_ONE = torch.tensor([[2, 3]])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: slice_patch_embed(_P, _W, torch.tensor([[2, 2]])), ValueError, "patches: got 6 rows, expected the 4"),
        (lambda: slice_patch_embed(_P, _W, torch.tensor([[-1, 2]])), ValueError, r"slice 0 has \[-1, 2\]"),
        (lambda: slice_patch_embed(_P, _W, _ONE.int()), TypeError, "slice_hw: got torch.int32"),
        (lambda: slice_patch_embed(_P, _W, _ONE, positions=torch.ones(5, 4)), ValueError, "positions: got 5 rows"),
        (lambda: slice_patch_embed(_P, _W, _ONE, positions=torch.ones(6, 4), grid=(2, 2)), ValueError, "cells of grid"),
        (lambda: slice_patch_embed(_P, _W, _ONE, mode="nearest"), ValueError, "mode: got 'nearest'"),
        (lambda: slice_patch_embed(_P, _W, _ONE, antialias=True, offset=0.1), ValueError, "offset: got 0.1"),
        (lambda: slice_patch_embed(_P, torch.ones(4, 2), _ONE), ValueError, r"weight: got shape \(4, 2\)"),
        (lambda: slice_attention(*[torch.ones(6, 2, 8)] * 3, torch.tensor([[2, 2]])), ValueError, "rise from 0 to 6"),
        (lambda: slice_attention(*[torch.ones(6, 2, 8)] * 3, torch.ones(1, 3).long()), ValueError, "slice_hw: got shape"),
        (lambda: slice_attention(*[torch.ones(6, 2, 8)] * 3, _ONE, prefix=-1), ValueError, "prefix: got -1"),
        (lambda: slice_attention(*[torch.ones(6, 2, 8)] * 3, slice_offsets(_ONE), prefix=1), ValueError, "beside offsets"),
        (lambda: segment_lora(_P, _P, torch.ones(1, 2, 3), torch.ones(1, 3, 2), torch.full((6,), 1)), ValueError, "window 1"),
        (lambda: segment_lora(_P, _P, torch.ones(1, 2, 3), torch.ones(1, 3, 2), torch.ones(6)), TypeError, "segment: got"),
        (lambda: segment_lora(_P, _P[:5], torch.ones(1, 2, 3), torch.ones(1, 3, 2), _P), ValueError, "base: got shape"),
        (lambda: splice_embeddings(_P, _W[:, :2], _ONE), ValueError, "visual: got shape"),
        (lambda: splice_embeddings(_P, _W, torch.tensor([0, 1, 1, 2])), ValueError, "expected distinct places"),
        (lambda: splice_embeddings(_P, _W, torch.tensor([0, 1, 6, 2])), ValueError, "got places 0 to 6"),
        (lambda: splice_embeddings(_P, _W, torch.tensor([-1, 4] * 3)), ValueError, "token 1 asks for row 4"),
        (lambda: splice_embeddings(_P, _W, torch.tensor([True] * 6)), ValueError, "one for each of 4 visual rows"),
        (lambda: splice_embeddings(_P, _W, torch.ones(2, 2).long()), ValueError, "positions: got shape"),
        (lambda: region_pool(_P, torch.tensor([[2, 2]])), ValueError, "x: got 6 rows, expected the 4"),
        (lambda: region_pool(_P, _ONE, grid=0), ValueError, "grid: got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_every_op_says_which_kernel_serves_it() -> None:
    rows = mmkernels.explain(splice_embeddings, _P, _W[:, :3], torch.tensor([0, 1, 2, 3]))
    assert rows[-1] == ("splice_embeddings", "reference", "")
    with using("reference"):
        assert splice_embeddings(_P, _W, torch.tensor([0, 1, 2, 3])).shape == _P.shape


def _whole(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Output and gradients of a pack, the loss being the same function of every row."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out = slice_attention(*leaves, offsets)
    weight = torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:]).to(out)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)


@COMPILED
@pytest.mark.parametrize("width", [64, 72, 80, 88, 104, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_has_the_bits_it_has_alone(width: int, dtype: torch.dtype) -> None:
    mixes = ([77, 5, 130, 1], [3, 130, 64, 64], [130], [129, 63, 130, 200])
    mine = torch.randn(3, 130, 2, width).to(dtype)
    found = []
    for n, mix in enumerate(mixes):
        at = mix.index(130)
        start = sum(mix[:at])
        pack = torch.randn(3, sum(mix), 2, width).to(dtype)
        if n == 1:
            pack.fill_(float("nan"))
        pack[:, start : start + 130] = mine
        found.append([x[start : start + 130] for x in _whole(*pack.unbind(0), mix)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@COMPILED
def test_seventy_thousand_slices_are_one_call() -> None:
    q = torch.randn(70_000, 1, 8)
    hw = torch.ones(70_000, 2, dtype=torch.int64)
    assert torch.equal(slice_attention(q, q, q, hw), q)
