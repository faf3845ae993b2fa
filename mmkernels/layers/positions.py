"""Position tables of square grids, and how they stretch to the grids of other image sizes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.primitives import _check


def sincos_positions(width: int, grid: int) -> Tensor:
    """A fixed 2-D table for `grid x grid` cells, row by row: half of the channels say the column, half the row.

    Each half is `[sin(p w_k) | cos(p w_k)]` with `w_k = 10000^(-k / (width / 4))`, k < width / 4; the column comes first.

    **Shapes** -> `[grid^2, width]`. **Dtypes** float32, whatever the default. **Gradient** none. **Edge** grid 1: one cell.
    **Raises** ValueError for sizes that are not positive and a width that 4 does not divide.
    **Source** MAE (arXiv 2111.06377), as Qwen-VL, Monkey and LLaVA-UHD use it. **Speed** built once.
    """
    _check.positive(width=width, grid=grid)
    if width % 4:
        raise ValueError(f"width: got {width}, expected a multiple of 4")
    steps = torch.arange(width // 4, dtype=torch.float32) / (width / 4)
    angles = torch.arange(grid, dtype=torch.float32)[:, None] * (1.0 / 10_000.0**steps)
    half = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = half.expand(grid, -1, -1), half[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)


def interpolate_positions(table: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """A table of a square grid, stretched to a grid of other height and width; as it is where the sizes agree.

    Bicubic (a = -0.75) with pixel centres at halves (`align_corners=False`), no antialiasing, edges repeated.

    **Shapes** table `[S^2, C]`, row by row -> `[height * width, C]`. **Dtypes** floats; computed in float32, given back in the
    table's. **Gradient** table. **Edge** the table's own size returns the table itself.
    **Raises** ValueError for a table that is no square and for grids that are not two positive numbers.
    **Source** Qwen-VL (arXiv 2308.12966). **Speed** one small resize: keep the result where the table is fixed.
    """
    _check.shapes(table=(table, "P C"))
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0] or side == 0:
        raise ValueError(f"table: got {table.shape[0]} rows, expected those of a square grid")
    height, width = check_grid(grid_hw)
    if (height, width) == (side, side):
        return table
    cells = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=(height, width), mode="bicubic", align_corners=False)
    return cells.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def check_grid(grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width. **Raises** ValueError, naming `grid_hw`, unless they are two positive integers."""
    try:
        height, width = (int(n) for n in grid_hw)
    except (TypeError, ValueError):
        raise ValueError(f"grid_hw: got {grid_hw!r}, expected (height, width)") from None
    if height < 1 or width < 1:
        raise ValueError(f"grid_hw: got {height} x {width}, expected positive sizes")
    return height, width
