"""Where the rows of packed slices stand. Letters: S slices, P patches, Q rows that stand before each slice's patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.primitives import _check


class Patches(NamedTuple):
    """Of every patch [P]: its slice, its row and column there, and the slice's rows and columns."""

    slice: Tensor
    y: Tensor
    x: Tensor
    h: Tensor
    w: Tensor


def patches_of(slice_hw: Tensor, patches: int) -> Patches:
    """Reads nothing on the host: a slice without patches is skipped, patches past the last one count on in it."""
    hw = torch.cat([slice_hw, slice_hw.new_ones(1, 2)])  # without any slice there is still one to name
    ends = (hw[:-1, 0] * hw[:-1, 1]).cumsum(0)
    p = torch.arange(patches, device=slice_hw.device)
    s = torch.searchsorted(ends, p, right=True)
    start = torch.cat([ends.new_zeros(1), ends])[s]
    h, w = hw[s].unbind(1)
    r, across = p - start, w.clamp(min=1)
    return Patches(s, torch.div(r, across, rounding_mode="floor"), r % across, h, w)


def check_slices(slice_hw: Tensor, patches: int, name: str = "patches") -> None:
    """Reads values: no negative size, and as many patches as the slices have."""
    if bool((slice_hw < 0).any()):
        row = int((slice_hw < 0).any(1).to(torch.uint8).argmax())
        raise ValueError(f"slice_hw: slice {row} has {slice_hw[row].tolist()}, expected (height, width) >= 0")
    total = int((slice_hw[:, 0] * slice_hw[:, 1]).sum())
    if total != patches:
        raise ValueError(f"{name}: got {patches} rows, expected the {total} patches of slice_hw")


def check_offsets(offsets: Tensor, rows: int) -> None:
    """Reads values: from 0 to the number of rows, never falling."""
    bad = bool((offsets[1:] < offsets[:-1]).any()) or int(offsets[0]) != 0 or int(offsets[-1]) != rows
    if bad:
        raise ValueError(
            f"slices: got offsets from {int(offsets[0])} to {int(offsets[-1])}, expected them to rise from 0 to {rows} rows"
        )


def slice_offsets(slice_hw: Tensor, prefix: int = 0) -> Tensor:
    """Where each packed slice starts, and where the last one ends: made once, for all layers of a tower.

    `offsets[s] = sum over t < s of (prefix + height[t] width[t])`.

    **Shapes** slice_hw `[S, 2]`, (height, width) in patches; `prefix` rows stand before each slice's patches, such as a class
    token. Returns `[S + 1]`. **Dtypes** int64 -> int32. **Gradient** none. **Edge** no slices: `[0]`; a slice of no patches
    keeps its prefix. **Raises** ValueError for shapes and a negative prefix, TypeError for dtypes.
    **Source** NaViT (arXiv 2307.06304). **Speed** one prefix sum, on the slices' device.
    """
    _check.shapes(slice_hw=(slice_hw, "S 2"))
    _check.dtypes((torch.int64,), slice_hw=slice_hw)
    if prefix < 0:
        raise ValueError(f"prefix: got {prefix}, expected a number of rows")
    lengths = slice_hw[:, 0] * slice_hw[:, 1] + prefix
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
