"""Square regions of a map, pooled as RoIAlign pools them: two small matrices, one for rows and one for columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.primitives import _check

_POOLS = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))  # width, height


def pool_size(ratio: float) -> tuple[int, int]:
    """How many cells (width, height) a region of a map with this ratio of width to height is pooled into.

    The first of seven sizes, in the published order, whose ratio is nearest by logarithm.
    **Raises** ValueError for ratios that are not positive and finite. **Source** LLaVA-UHD, ECCV release.
    """
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"ratio: got {ratio}, expected a positive number")
    return min(_POOLS, key=lambda size: abs(math.log(ratio) - math.log(size[0] / size[1])))


def region_weights(
    cells: int, regions: int, bins: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What every bin of every region takes of a line of `cells`: `[regions, bins, cells]`.

    Region j is `[j cells / regions, (j + 1) cells / regions]`, its ends rounded to `dtype` and its length at least 1; a bin is
    the mean of `ceil(length / bins)` points at the middles of as many parts, each linear between the two cells beside it; cell
    i lies at i. Points outside `[-1, cells]` count as 0. The mean over a rectangle is the product of two lines.
    **Source** RoIAlign (arXiv 1703.06870) with `aligned=False`, `sampling_ratio=-1`.
    """
    _check.positive(cells=cells, regions=regions, bins=bins)
    wide = torch.promote_types(dtype, torch.float32)
    ends = (
        torch.tensor([j * cells / regions for j in range(regions + 1)], dtype=torch.float64)
        .to(dtype)
        .to(wide)
    )
    start, length = ends[:-1], (ends[1:] - ends[:-1]).clamp(min=1)
    step = length / bins
    points = step.ceil().long()
    most = int(points.max())
    part = torch.arange(most)
    share = (part + 0.5).to(wide) / points[:, None]
    at = (
        start[:, None, None]
        + (torch.arange(bins, dtype=wide)[:, None] + share[:, None]) * step[:, None, None]
    )
    counts = (part < points[:, None])[:, None] & (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    low = at.floor().clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    upper = at - low
    taken = torch.where(counts, 1 / points.to(wide)[:, None, None], 0)
    weights = torch.zeros(regions, bins, cells, dtype=wide)
    weights.scatter_add_(2, low.long(), taken * (1 - upper))
    weights.scatter_add_(2, high.long(), taken * upper)
    return weights.to(device, dtype)
