"""SliME's projector: a soft mixture of a perceptron and of queries that read the image before the same perceptron."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.projector import Projector
from mmkernels.layers.spatial_resampler import SpatialResampler
from mmkernels.primitives import _check

_NOISE, _EPS = 1e-2, 1e-6


class MixtureAdapter(nn.Module):
    """Vision tokens to language-model tokens: `g0 MLP(x) + g1 MLP(resampler(x))`, both experts for every token.

    `l = x W`, `p = softmax(l + e (softplus(l) + 0.01))`, `g = p / (sum p + 1e-6)`; e is drawn from N(0, 1) in training and 0
    elsewhere. W starts at 0, so both experts start with one half. Images of other than `grid^2` tokens (SliME's compressed
    slices) take the perceptron alone. `gates` are those of the last pass, `[N, P, 2]`, or None where nothing was mixed.

    **Source** SliME (arXiv 2406.08487); weights of `slime` load by `weights.load`.
    """

    sources = ("slime",)

    def __init__(self, width_in: int, width_out: int, grid: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.projection = Projector("mlp2x_gelu", width_in, width_out)
        self.resampler = SpatialResampler(grid, width_in, heads, release="slime")
        self.gate = nn.Parameter(torch.zeros(width_in, 2))
        self.gates: Tensor | None = None

    def forward(self, x: Tensor, expert: int | None = None, noise: Tensor | None = None) -> Tensor:
        """`expert` 0 is the perceptron alone, 1 the resampler before it, None (published as -1) the mixture.

        **Shapes** x `[N, P, width_in]` or `[P, width_in]`, whole images; noise, instead of what training draws, x's shape with
        2 in the place of the width. Returns x's shape with `width_out`.
        **Dtypes** x as the parameters, or torch.autocast. **Gradient** x and the parameters of what is computed.
        **Raises** ValueError for shapes and other experts.
        """
        _check.choice("expert", expert, (None, -1, 0, 1))
        if x.dim() == 2:
            y = self(x.unsqueeze(0), expert, None if noise is None else noise.unsqueeze(0))
            return y.squeeze(0)
        size = _check.shapes(x=(x, f"N P {self.resampler.media_width}"), noise=(noise, "N P 2"))
        self.gates, mixes = None, expert in (None, -1)
        if size["P"] != self.grid**2 or expert == 0:
            return self.projection(x)
        hw = torch.full((size["N"], 2), self.grid, dtype=torch.int64, device="cpu")
        seen = self.projection(self.resampler(x, hw))
        if not mixes:
            return seen
        self.gates = g = self._gates(x, noise)
        return g[..., :1] * self.projection(x) + g[..., 1:] * seen

    def _gates(self, x: Tensor, noise: Tensor | None) -> Tensor:
        logits = x @ self.gate.to(x.dtype)
        if noise is None and self.training:
            noise = torch.randn_like(logits)
        if noise is not None:
            logits = logits + noise.to(logits.dtype) * (F.softplus(logits) + _NOISE)
        p = logits.softmax(-1)
        return p / (p.sum(-1, keepdim=True) + _EPS)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters; their noise's weights, which nothing reads, are skipped."""
        parts = Table(renames(input="0", output="2")).under("projection.", "projection.")
        resampler = Table(self.resampler.published(source).rules).under("resampler.", "attn.")
        rules = (*parts.rules, *resampler.rules, Rule("gate", ("w_gate",)))
        return Table(rules, ignored=("w_noise", "mean", "std"), within="model.mm_projector.")
