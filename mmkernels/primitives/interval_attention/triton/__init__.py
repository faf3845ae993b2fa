"""Interval attention in Triton: the plan. Nothing here imports triton; the first call does (launch.py).

Letters: M query rows and N keys of a tile, R = H / G query heads to a key head, D head width, S splits.

**Rows.** The R heads of a token that share a key head are R rows of one tile, so keys are read once for all of them: row r of
key head g is (token r // R, head g R + r % R). With one token and many heads a tile is full all the same.

**Forward** (forward.py). A program owns M rows and one key head. It loads its queries and their intervals once, and walks the
runs of keys that some row sees, N at a time. Where each row's interval touches that of the row before, the ordinary case, that
is one run; else the next run is grown row by row. Keys that no row sees are never loaded, so what they hold cannot matter.
Softmax is online. A tile inside every row's interval skips the mask. Bytes: q, out and lse once; k and v once for every tile of
rows that meets them. Few rows against many keys: S programs share the hull of a tile's intervals in equal parts, and `combine`
joins them in order.

**Backward** (backward.py), three launches. `hulls` reduces the intervals of every query tile, and of every 64 tiles, to a hull.
`backward_q` owns M rows and walks as forward does; it leaves norm and delta of every row. `backward_kv` owns N keys, finds the
query tiles that meet them by two levels of hulls, 64 at a time as the bits of one word, and walks those. No order of the
intervals is assumed, and no tile is visited that meets nothing. Long walks are shared by S programs, tile i going to program
i mod S, and added up in order. No atomics: every gradient has the same bits in every run.

**Shapes decide** tiles and splits; `lo` and `hi` are never read by the host. float32 products are six bfloat16 ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.primitives import _triton
from mmkernels.primitives.interval_attention import op

_LAUNCH = f"{__name__}.launch"


def _supports(q: Tensor, *_: Any) -> str:
    return op.kernel_head_dim(q) or _triton.refuses(q)


def _supports_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, *_: Any) -> str:
    return _supports(q)


_triton.register(op.FORWARD, _LAUNCH, "forward", _supports)
_triton.register(op.BACKWARD, _LAUNCH, "backward", _supports_backward)
