"""LaVIN's adapter: two low-rank branches over normalised tokens, mixed by a router that reads one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._derived import Derived
from mmkernels.layers._published import Rule, Table
from mmkernels.primitives import _autocast, _check

DROPOUT = 0.1


@dataclass(frozen=True)
class AdapterConfig:
    """Arguments of `ModalityAdapter`, and which token's router a row follows (`reads`).

    "first": the sequence's first token that is not padding, for the whole sequence. "token": every token its own.
    "first_image": every token that of the batch's first sequence, as LaVIN's CLIP does, whose blocks have the batch second.
    """

    rank: int = 8
    groups: int = 2
    temperature: float = 10.0
    scale: float = 1.0
    router_dtype: torch.dtype | None = None
    routed: bool = True
    reads: str = "first"


class ModalityAdapter(nn.Module):
    """Two low-rank branches that share their first half, mixed by a router; without one, a single plain branch.

    `y = x + scale (w_0 B(a) + w_1 D(a))`, `a = dropout_0.1(A x)`, `w = softmax((R x_0 + b) / temperature)`. B and D are
    grouped: the i-th of `groups` parts of the channels reads the i-th part of a. `routed=False` is `B(a)` alone, without x and
    without scale.

    **Shapes** x `[B, T, C]` -> `[B, T, C]`; `weights` instead of the router's: `[B, 2]`, else `[T, 2]` for every sequence,
    or `[B or 1, T or 1, 2]`. **Dtypes** parameters may be wider than x, whose dtype y takes. The router is never narrower
    than float32, nor is what `routed=False` gives. `router_dtype=torch.float16` rounds w as the published code does (None:
    exact), and the gradients through it. **Gradient** x, weights, parameters.
    **Edge** a fresh adapter changes nothing (B and D are 0; plain: gives 0); T = 0 needs `weights`. Dropout while training.
    **Raises** ValueError for shapes and numbers; TypeError for dtypes.
    **Source** LaVIN (arXiv 2305.15023); published weights load by `weights.load` as `lavin`.
    **Speed** one product down, one up for both branches: `python -m benchmarks.adapters`.
    """

    sources = ("lavin",)

    def __init__(
        self,
        width: int,
        rank: int = 8,
        groups: int = 2,
        temperature: float = 10.0,
        scale: float = 1.0,
        router_dtype: torch.dtype | None = None,
        routed: bool = True,
    ) -> None:
        super().__init__()
        _check.positive(width=width, rank=rank, groups=groups)
        if rank % groups or width % groups:
            raise ValueError(f"groups: got {groups}, expected a divisor of rank {rank} and width {width}")
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, expected above 0")
        if router_dtype is not None and router_dtype not in _check.FLOATS:
            raise TypeError(f"router_dtype: got {router_dtype}, expected a floating dtype or None")
        self.width, self.rank, self.groups = width, rank, groups
        self.temperature, self.scale, self.router_dtype = float(temperature), float(scale), router_dtype
        self.down = nn.Linear(width, rank)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        branches = 2 if routed else 1
        self.up = nn.Parameter(torch.zeros(branches, width, rank // groups))
        self.up_bias = nn.Parameter(torch.zeros(branches, width))
        self.router = nn.Linear(width, 2) if routed else None
        self._joined = Derived()

    def extra_repr(self) -> str:
        return f"{self.width}, rank={self.rank}, groups={self.groups}, routed={self.router is not None}"

    def route(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """w of every sequence from its token 0, or from token `at [B]`: x `[B, T, C]` -> `[B, 2]`, in `router_dtype`."""
        if self.router is None:
            raise ValueError("routed: got False for this adapter, expected one with a router")
        size = _check.shapes(x=(x, f"B T {self.width}"), at=(at, "B"))
        if size["T"] == 0:
            raise ValueError("x: got 0 tokens, expected one to route by at least")
        if at is not None:
            index = at.long()[:, None, None].expand(-1, 1, self.width)
            x = x.gather(1, index)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with _autocast.off(x.device.type):
            logits = F.linear(x[:, 0].to(dtype), self.router.weight.to(dtype), self.router.bias.to(dtype))
        weights = (logits / self.temperature).softmax(-1)
        return weights if self.router_dtype is None else weights.to(self.router_dtype)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        _check.shapes(x=(x, f"B T {self.width}"))
        _check.dtypes(_check.FLOATS, x=x)
        a = F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))
        a = F.dropout(a, DROPOUT, self.training)
        up = self._joined(self._join, self.up, self.up_bias).to(x.dtype)
        if self.router is None:
            if weights is not None:
                raise ValueError("weights: got some for an adapter with routed=False, expected None")
            wide = torch.promote_types(x.dtype, torch.float32)
            return torch.addmm(up[-1], a.flatten(0, 1), up[:-1]).view(x.shape).to(wide)
        w = self.route(x) if weights is None else weights
        w = self.scale * self._of_rows(w, x).to(torch.promote_types(x.dtype, torch.float32))
        mixed = (w.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)  # [w_0 a, w_1 a]
        rows = torch.cat([mixed, w.expand(*a.shape[:2], 2)], dim=-1).to(x.dtype)
        with _autocast.off(x.device.type):  # x is not to be rounded
            return torch.addmm(x.flatten(0, 1), rows.flatten(0, 1), up).view(x.shape)

    def _of_rows(self, w: Tensor, x: Tensor) -> Tensor:
        """Weights of any accepted shape as `[B or 1, T or 1, 2]`."""
        b, t = x.shape[:2]
        _check.dtypes(_check.FLOATS, weights=w)
        if w.shape == (b, 2):
            return w.unsqueeze(1)
        if w.shape == (t, 2):
            return w.unsqueeze(0)
        if w.dim() == 3 and w.shape[0] in (1, b) and w.shape[1] in (1, t) and w.shape[2] == 2:
            return w
        raise ValueError(
            f"weights: got shape {tuple(w.shape)}, expected [{b}, 2], [{t}, 2] or [{b} or 1, {t} or 1, 2]"
        )

    def _join(self) -> Tensor:
        """All branches as one matrix with the biases below: `[branches rank + branches, C]`, zero between groups."""
        g = self.groups
        parts = self.up.unflatten(1, (g, -1)).transpose(2, 3)  # [branches, g, rank / g, C / g]
        own = torch.eye(g, dtype=torch.bool, device=self.up.device)[:, None, :, None]
        zero = self.up.new_zeros(())
        return torch.cat([torch.where(own, parts.unsqueeze(3), zero).reshape(-1, self.width), self.up_bias])

    def adapt(
        self,
        x: Tensor,
        reads: str,
        first: Tensor | None = None,
        kept: dict[int, Tensor] | None = None,
        layer: int = 0,
    ) -> Tensor:
        """What a block attends with instead of x, in x's dtype: `reads` as in `AdapterConfig`, `first [B]` as `at` of `route`.

        `kept` has the layer's weights of "first" once its sequences have begun, and is given them when they begin.
        """
        if self.router is None:
            return self(x).to(x.dtype)
        if reads == "token":
            return self(x, self.route(x.reshape(-1, 1, self.width)).view(*x.shape[:2], 2))
        if reads == "first_image":
            return self(x, self.route(x[0].unsqueeze(1)).unsqueeze(0))
        weights = None if kept is None else kept.get(layer)
        if weights is None:
            weights = self.route(x, first)
            if kept is not None:
                kept[layer] = weights
        return self(x, weights.unsqueeze(1))

    def published(self, source: str) -> Table:
        """Where the authors' file keeps the adapter's parameters: convolutions of one place."""
        names = ("conv_B", "conv_D") if self.router is not None else ("conv_B",)
        n = len(names)
        return Table(
            (
                Rule(r"down\.weight", ("conv_A.weight",), lambda t: t.flatten(1)),
                Rule(r"down\.bias", ("conv_A.bias",)),
                Rule(
                    "up",
                    tuple(f"{name}.weight" for name in names),
                    lambda t: t.flatten(1).unflatten(0, (n, -1)),
                ),
                Rule("up_bias", tuple(f"{name}.bias" for name in names), lambda t: t.unflatten(0, (n, -1))),
                Rule(r"router\.(\w+)", ("expert_weights.{0}",)),
            )
        )


def adapters_table(blocks: Iterable[Any], source: str, theirs: str) -> Table:
    """Where a stack's file keeps the adapters of its `blocks`, whose layers lie under `theirs`, by number."""
    table = Table(())
    for n, block in enumerate(blocks):
        if block.adapter is not None:
            table += block.adapter.published(source).under(
                f"blocks.{n}.adapter.", f"{theirs}.{n}.adapter_attn."
            )
    return table
