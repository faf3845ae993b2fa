"""Which images a text row sees: `media_intervals`, the metadata all layers share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.gated_cross_attention import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op


class Intervals(NamedTuple):
    """Which flat keys each flat row sees: lo, hi int32 [R]; rows marked in `uniform` bool [R] average what they see."""

    lo: Tensor
    hi: Tensor
    uniform: Tensor

    def without_uniform(self) -> Intervals:
        """Uniform rows see nothing instead: their attention is exactly zero."""
        return Intervals(self.lo, torch.where(self.uniform, self.lo, self.hi), torch.zeros_like(self.uniform))


def _fake_intervals(media_locations: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = media_locations.shape[0] * rest[-1]
    new = media_locations.new_empty
    return (new(rows, dtype=torch.int32), new(rows, dtype=torch.int32), new(rows, dtype=torch.bool))


MEDIA_INTERVALS = Op(
    "media_intervals(Tensor media_locations, int latents, int num_media, bool all_previous, bool use_cached_media, "
    "bool attend_previous, int rows) -> (Tensor lo, Tensor hi, Tensor uniform)",
    reference.media_intervals,
    fake=_fake_intervals,
)
MEDIA_INTERVALS.compiled("cuda")


def media_intervals(
    media_locations: Tensor,
    latents: int,
    *,
    num_media: int,
    media_mode: str = "last",
    use_cached_media: bool = False,
    attend_previous: bool = True,
    rows: int | None = None,
) -> Intervals:
    """Flamingo's visibility as intervals over the flat keys `[B * num_media * latents]`.

    With t the number of media tokens up to and including a position: "last" sees `[(t-1) latents, t latents)`,
    "all_previous" sees `[0, min(t, num_media) latents)`, each offset by its sample.

    **Shapes** media_locations `[B, T]`, True at media tokens; the result has `B * T` rows. With `use_cached_media` every
    row has the sample's total count and there are `B * rows` rows (`rows` = T when None): the text being decoded.
    **Dtypes** bool in; int32, int32, bool out. **Gradient** none.
    **Edge** as published: "last" before any image is empty, past the last medium it is uniform over all latents of the sample;
    "all_previous" before any image is uniform over all. `attend_previous=False` (Otter) gives text the image after it.
    `Intervals.without_uniform()` makes uniform rows empty.
    **Raises** ValueError for shapes, modes and sizes; TypeError for dtypes.
    **Source** Flamingo (arXiv 2204.14198) 2.3 and its public implementations.
    **Speed** metadata: O(rows), one launch on CUDA, no host sync, shared by all layers.
    """
    size = _check.shapes(media_locations=(media_locations, "B T"))
    _check.dtypes((torch.bool,), media_locations=media_locations)
    _check.positive(latents=latents)
    _check.choice("media_mode", media_mode, ("last", "all_previous"))
    if num_media < 0:
        raise ValueError(f"num_media: got {num_media}, expected 0 or more")
    if rows is not None and rows != size["T"] and not use_cached_media:
        raise ValueError(
            f"rows: got {rows}, expected {size['T']} like media_locations unless use_cached_media"
        )
    rows = size["T"] if rows is None else rows
    flags = (media_mode == "all_previous", use_cached_media, attend_previous, rows)
    return Intervals(*MEDIA_INTERVALS(media_locations, latents, num_media, *flags))
