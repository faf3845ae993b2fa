"""Monkey's transformer block: one set of weights for all windows of a picture, and a low-rank update for each window."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.layers.decoder_tables import heads_last
from mmkernels.ops.sliced_image import segment_lora
from mmkernels.primitives import _check
from mmkernels.primitives.interval_attention import interval_attention

ATTENTION_RANK, MLP_RANK, DROPOUT = 16, 32, 0.05
_NAMES = {
    "attention_norm": "ln_1", r"attention\.qkv": "attn.in_proj", r"attention\.out": "attn.out_proj", "mlp_norm": "ln_2",
    r"mlp\.up": "mlp.c_fc", r"mlp\.down": "mlp.c_proj",
}  # fmt: skip


class WindowLora(nn.Module):
    """`base + scale_w B_w A_w dropout(x)` for the rows of window w; B starts at 0, the learned scales at 1."""

    def __init__(self, windows: int, inputs: int, outputs: int, rank: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.dropout = dropout
        self.a = nn.Parameter(torch.empty(windows, rank, inputs))
        self.b = nn.Parameter(torch.zeros(windows, outputs, rank))
        self.scale = nn.Parameter(torch.ones(windows))
        for a in self.a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor, base: Tensor, segment: Tensor) -> Tensor:
        """x `[R, inputs]`, base `[R, outputs]`, segment `[R]`: each row's window, -1 for none."""
        x = F.dropout(x, self.dropout, self.training)
        return segment_lora(x, base, self.a, self.b * self.scale[:, None, None], segment)


class MonkeyBlock(Block):
    """`x' = x + attn(LN(x))`, `y = x' + MLP(LN(x')) + lora(x')`; attention's two products have updates of their own.

    The feed-forward's update reads the un-normed x' and stands beside the whole of it. Ranks are 16 and 32; there is no
    `alpha / rank`: a learned scale for each window and update instead. Rows of window -1 (the view of the whole picture) take
    the shared weights alone.

    **Source** Monkey (arXiv 2311.06607); weights of `monkey` load by `weights.load`.
    """

    sources = ("monkey",)

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        windows: int = 4,
        *,
        eps: float = 1e-6,
        dropout: float = DROPOUT,
    ) -> None:
        _check.positive(width=width, heads=heads, hidden=hidden, windows=windows)
        super().__init__(BlockConfig(width, heads, hidden, activation="gelu", eps=eps))
        self.windows = windows
        self.qkv_lora = WindowLora(windows, width, 3 * width, ATTENTION_RANK, dropout)
        self.out_lora = WindowLora(windows, width, width, ATTENTION_RANK, dropout)
        self.mlp_lora = WindowLora(windows, width, width, MLP_RANK, dropout)

    def forward(self, x: Tensor, window: Tensor | int | None = None) -> Tensor:  # type: ignore[override]
        """**Shapes** x `[N, M, width]`, N views of M tokens, each attending to itself; window int64 `[N]`, or one for all of
        them, None or -1 for none. Returns x's shape. **Dtypes** x as the parameters, or torch.autocast.
        **Gradient** x and every parameter; those of a window without views are exactly 0.
        **Raises** ValueError for shapes and, on CPU, for windows out of range.
        """
        n, m = _check.shapes(x=(x, f"N M {self.config.width}"))["N"], x.shape[1]
        if not isinstance(window, Tensor):
            window = torch.full((n,), -1 if window is None else window, dtype=torch.int64, device=x.device)
        _check.shapes(window=(window, f"{n}"))
        segment = window.repeat_interleave(m)
        rows = x.flatten(0, 1)
        rows = rows + self._attend(self.attention_norm(rows), segment, n)
        assert self.mlp_norm is not None  # a pre-norm block has it
        base = rows + self.mlp(self.mlp_norm(rows))
        return self.mlp_lora(rows, base, segment).view_as(x)

    def _attend(self, h: Tensor, segment: Tensor, views: int) -> Tensor:
        qkv = self.qkv_lora(h, self.attention.qkv(h), segment)
        q, k, v = (
            t.unflatten(-1, (self.attention.heads, -1)).unflatten(0, (views, -1)).transpose(1, 2)
            for t in qkv.chunk(3, -1)
        )
        lo = torch.zeros(views, q.shape[2], dtype=torch.int32, device=h.device)
        o = interval_attention(q, k, v, lo, torch.full_like(lo, q.shape[2]))
        c = o.transpose(1, 2).flatten(2).flatten(0, 1)  # type: ignore[union-attr]
        return self.out_lora(c, self.attention.out(c), segment)

    def published(self, source: str) -> Table:
        """Where the authors' file keeps a block's parameters, under the block's own prefix."""
        return blocks_table(self.attention.heads, self.windows)


def blocks_table(heads: int, windows: int, ours: str = "", theirs: str = "") -> Table:
    """The table of blocks that lie under `ours` (a pattern) and `theirs`, which may have a number in `{0}`."""
    shift = 1 if "{0}" in theirs else 0
    end = f"{{{shift}}}"

    def by_window(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (windows, -1))

    def by_head(rows: Tensor) -> Tensor:
        return torch.stack([heads_last(part, heads) for part in rows.chunk(windows)])

    rules = [
        Rule(
            rf"{ours}{mine}\.(weight|bias)",
            (f"{theirs}{name}.{end}",),
            (lambda t: heads_last(t, heads)) if name == "attn.in_proj" else None,
        )
        for mine, name in _NAMES.items()
    ]
    for mine, name in (
        ("qkv_lora", "attn.in_proj_lora"),
        ("out_lora", "attn.out_proj_lora"),
        ("mlp_lora", "mlp_lora"),
    ):
        at = [f"{theirs}{name}.{w}." for w in range(windows)]
        rules += [
            Rule(rf"{ours}{mine}\.a", tuple(f"{key}lora_a.weight" for key in at), by_window),
            Rule(
                rf"{ours}{mine}\.b",
                tuple(f"{key}lora_b.weight" for key in at),
                by_head if mine == "qkv_lora" else by_window,
            ),
            Rule(rf"{ours}{mine}\.scale", tuple(f"{key}lora_scale" for key in at)),
        ]
    return Table(tuple(rules))
