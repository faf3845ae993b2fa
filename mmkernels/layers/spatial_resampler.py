"""Qwen-VL's resampler for slices of any size, as LLaVA-UHD and SliME have it: queries read a whole slice, or their regions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.positions import interpolate_positions
from mmkernels.layers.qwen_resampler import QwenResampler
from mmkernels.ops import sliced_image
from mmkernels.ops.sliced_image import region_attention
from mmkernels.primitives import _check
from mmkernels.primitives.interval_attention import interval_attention

RELEASES = ("original", "eccv", "slime")
_SOURCES = {"original": ("llava_uhd",), "eccv": ("llava_uhd",), "slime": ("slime",)}
_WITHIN = {"llava_uhd": "model.mm_projector.", "slime": "model.sampler.post_qformer."}


def pool_size(ratio: float) -> tuple[int, int]:
    """How many cells (width, height) a region of a map with this ratio of width to height is pooled into.

    The first of seven sizes, in the published order, whose ratio is nearest by logarithm.
    **Raises** ValueError for ratios that are not positive and finite. **Source** LLaVA-UHD, ECCV release.
    """
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"ratio: got {ratio}, expected a positive number")
    return sliced_image.pool_size(ratio)


class SpatialResampler(QwenResampler):
    """`grid^2` learned queries read every slice once: `r` of `QwenResampler`, then `LN(r) proj`; SliME leaves `proj` out.

    - `original` (LLaVA-UHD as first released), `slime`: every query reads all tokens of the slice; the positions of keys are
      the query table stretched to the slice's grid.
    - `eccv` (LLaVA-UHD's later release): the slice is cut into `grid x grid` regions, and query t reads only the 6 to 12 cells
      that RoIAlign makes of region t's keys and values (see `pool_size`).

    SliME keeps its position table in float16: its values, and those stretched from them, are rounded so.

    **Source** LLaVA-UHD (arXiv 2403.11703), SliME (arXiv 2406.08487); weights of `llava_uhd` and `slime` load by
    `weights.load`.
    """

    def __init__(
        self, grid: int, width: int, heads: int, media_width: int | None = None, *, release: str = "original"
    ) -> None:
        _check.choice("release", release, RELEASES)
        super().__init__(grid, width, heads, media_width)
        self.grid, self.release, self.sources = grid, release, _SOURCES[release]
        self.post_norm = nn.LayerNorm(width, self.query_norm.eps)
        if release != "slime":
            self.proj = nn.Parameter(torch.randn(width, width) * width**-0.5)
            return
        self.positions.copy_(self.positions.half())
        for module in (self.kv, self.out):  # SliME leaves torch's own initial values
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, slice_hw: Tensor) -> Tensor:  # type: ignore[override]
        """Reads every slice into `grid^2` tokens.

        **Shapes** x `[S, M, media_width]`, each slice's tokens row by row, first in its row of x; slice_hw `[S, 2]` (height,
        width) in tokens. Returns `[S, grid^2, width]`.
        **Dtypes** the parameters'; slice_hw int64. **Gradient** x and every parameter.
        **Edge** no slices: `[0, grid^2, width]`; what x holds behind a slice's tokens changes nothing, NaN included; regions
        narrower than a cell are taken one cell wide, as published.
        **Raises** ValueError for shapes and for sizes that are not positive or have more than M tokens; TypeError for dtypes.
        **Speed** slice_hw is read on the host: keep it there. Tables are stretched once for each size in the batch.
        """
        sizes = self._sizes(x, slice_hw)
        m = x.shape[1]
        count = torch.tensor([h * w for h, w in sizes], dtype=torch.int64, device=x.device)
        x = torch.where((torch.arange(m, device=x.device) < count[:, None]).unsqueeze(-1), x, 0)
        c = self.media_norm(self.kv(x))
        read = self._regions if self.release == "eccv" else self._whole
        r = self.post_norm(self.out(read(c, sizes, count)))
        return r if self.release == "slime" else r @ self.proj

    def _sizes(self, x: Tensor, slice_hw: Tensor) -> list[tuple[int, int]]:
        s, m, _ = self._check(x)
        _check.shapes(slice_hw=(slice_hw, f"{s} 2"))
        _check.dtypes((torch.int64,), slice_hw=slice_hw)
        sizes = [(int(h), int(w)) for h, w in slice_hw.tolist()]
        for n, (h, w) in enumerate(sizes):
            if h < 1 or w < 1 or h * w > m:
                raise ValueError(
                    f"slice_hw: got {h} x {w} for slice {n}, expected positive sizes of at most x's {m} tokens"
                )
        return sizes

    def _table(self, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The positions of a slice's keys `[height * width, width]`."""
        table = self.positions.half() if self.release == "slime" else self.positions
        return interpolate_positions(table, size).to(dtype)

    def _whole(self, c: Tensor, sizes: list[tuple[int, int]], count: Tensor) -> Tensor:
        s, m, width = c.shape
        known = {size: self._table(size, c.dtype) for size in sizes}
        rows = [F.pad(known[size], (0, 0, 0, m - len(known[size]))) for size in sizes]
        positions = torch.stack(rows) if rows else c.new_zeros(0, m, width)
        k, v = self._keys(c + positions), self._values(c)
        q = self.queries().unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(s, -1, -1, -1)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (k, v))
        hi = count.int().unsqueeze(1).expand(-1, q.shape[2]).contiguous()
        o = interval_attention(q, k, v, torch.zeros_like(hi), hi)
        return o.transpose(1, 2).flatten(2)  # type: ignore[union-attr]

    def _regions(self, c: Tensor, sizes: list[tuple[int, int]], count: Tensor) -> Tensor:
        """Keys and values are projected before they are pooled: there are fewer of them, and pooling is linear. A bias of keys
        moves all scores of a query alike, one of values comes out as it is.
        """
        if not sizes:
            return c.new_zeros(0, *self.query.shape)
        packed = torch.cat([row[: h * w] for row, (h, w) in zip(c, sizes, strict=True)])
        positions = torch.cat([self._table(size, c.dtype) for size in sizes])
        k, v = self._keys(packed + positions, bias=False), self._values(packed, bias=False)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.queries(), k, v))
        hw = torch.tensor(sizes, dtype=torch.int64, device=c.device)
        o = region_attention(q, k, v, hw, grid=self.grid).flatten(2)
        return o + self.qkv.bias.chunk(3)[2].to(o.dtype)

    def _keys(self, x: Tensor, *, bias: bool = True) -> Tensor:
        _, weight, _ = self.qkv.weight.chunk(3)
        return F.linear(x, weight, self.qkv.bias.chunk(3)[1] if bias else None)

    def _values(self, x: Tensor, *, bias: bool = True) -> Tensor:
        _, _, weight = self.qkv.weight.chunk(3)
        return F.linear(x, weight, self.qkv.bias.chunk(3)[2] if bias else None)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters."""
        rules = super().published("qwen_vl").rules
        rest = (*renames(post_norm="ln_post"), Rule("proj", ("proj",)))
        return Table((*rules, *rest), within=_WITHIN[source])
