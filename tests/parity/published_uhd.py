"""LLaVA-UHD's and SliME's adapters with the authors' parameter names, as plainly as their papers say them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from published_qwen import stretched
from torch import Tensor, nn


def roi_align(x: Tensor, box: tuple[float, float, float, float], oh: int, ow: int) -> Tensor:
    """One region of a map `[C, H, W]` -> `[C, oh, ow]`: `aligned=False`, `sampling_ratio=-1`, point by point."""
    _, height, width = x.shape
    x0, y0, x1, y1 = box
    bh, bw = max(y1 - y0, 1.0) / oh, max(x1 - x0, 1.0) / ow
    nh, nw = math.ceil(bh), math.ceil(bw)
    out = []
    for i in range(oh):
        for j in range(ow):
            total = x.new_zeros(x.shape[0])
            for a in range(nh):
                for b in range(nw):
                    y = y0 + i * bh + (a + 0.5) * bh / nh
                    z = x0 + j * bw + (b + 0.5) * bw / nw
                    total = total + _bilinear(x, y, z, height, width)
            out.append(total / (nh * nw))
    return torch.stack(out, 1).view(-1, oh, ow)


def _bilinear(x: Tensor, y: float, z: float, height: int, width: int) -> Tensor:
    if y < -1 or y > height or z < -1 or z > width:
        return x.new_zeros(x.shape[0])
    y, z = max(y, 0.0), max(z, 0.0)
    y0, z0 = int(y), int(z)
    if y0 >= height - 1:
        y0 = y1 = height - 1
        y = float(y0)
    else:
        y1 = y0 + 1
    if z0 >= width - 1:
        z0 = z1 = width - 1
        z = float(z0)
    else:
        z1 = z0 + 1
    ly, lz = y - y0, z - z0
    return (
        (1 - ly) * (1 - lz) * x[:, y0, z0] + (1 - ly) * lz * x[:, y0, z1]
        + ly * (1 - lz) * x[:, y1, z0] + ly * lz * x[:, y1, z1]
    )  # fmt: skip


class Resampler(nn.Module):
    """release "original", "eccv" or "slime", on one grid for all slices `[S, h w, C]`."""

    def __init__(self, grid: int, width: int, heads: int, media_width: int, release: str) -> None:
        super().__init__()
        self.grid, self.release = grid, release
        table = torch.randn(grid * grid, width)
        self.pos_embed = nn.Parameter(table.half() if release == "slime" else table, requires_grad=False)
        self.query = nn.Parameter(torch.randn(grid * grid, width))
        self.kv_proj = nn.Identity() if media_width == width else nn.Linear(media_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        if release != "slime":
            self.proj = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        c = self.ln_kv(self.kv_proj(x))
        q = (self.ln_q(self.query) + self.pos_embed.to(x.dtype)).expand(len(x), -1, -1)
        k = c + stretched(self.pos_embed, *size).to(x.dtype)
        if self.release == "eccv":
            k, v = (torch.stack([self.regions(t.T.unflatten(1, size)) for t in y]) for y in (k, c))
            out = [self.attn(q[n].unsqueeze(1), k[n], v[n])[0].squeeze(1) for n in range(len(x))]
            r = torch.stack(out)
        else:
            r = self.attn(q, k, c)[0]
        r = self.ln_post(r)
        return r if self.release == "slime" else r @ self.proj

    def regions(self, x: Tensor) -> Tensor:
        """[C, h, w] -> [grid^2, cells, C]."""
        _, height, width = x.shape
        pools = [(4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4)]
        best, least = (3, 3), math.inf
        for pool in pools:
            off = abs(math.log(width / height) - math.log(pool[0] / pool[1]))
            if off < least:
                best, least = pool, off
        rows = []
        for i in range(self.grid):
            for j in range(self.grid):
                g = self.grid
                box = [j * width / g, i * height / g, (j + 1) * width / g, (i + 1) * height / g]
                box = torch.tensor(box, dtype=torch.float64).to(x.dtype).tolist()
                rows.append(roi_align(x, tuple(box), best[1], best[0]).flatten(1).T)
        return torch.stack(rows)


class Gated(nn.Module):
    """SliME's projector."""

    def __init__(self, width_in: int, width_out: int, grid: int, heads: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out)
        )
        self.attn = Resampler(grid, width_in, heads, width_in, "slime")
        self.w_gate = nn.Parameter(torch.randn(width_in, 2))
        self.w_noise = nn.Parameter(torch.zeros(width_in, 2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def forward(self, x: Tensor, noise: Tensor | None = None, expert: int = -1) -> Tensor:
        grid = self.attn.grid
        if x.shape[1] != grid**2:
            return self.projection(x)
        outs = [self.projection(x), self.projection(self.attn(x, (grid, grid)))]
        if expert >= 0:
            return outs[expert]
        logits = x @ self.w_gate
        if noise is not None:
            logits = logits + noise * (F.softplus(logits) + 0.01)
        p = logits.softmax(-1)
        g = p / (p.sum(-1, keepdim=True) + 1e-6)
        return (torch.stack(outs, -1) @ g.unsqueeze(-1)).squeeze(-1)


class Selector(nn.Module):
    """SliME's router with attention, up to its first softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, width))
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.cross_attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width) for _ in range(3))
        self.prob_proj = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 1))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, temperature: float) -> Tensor:
        x, text = self.ln_q(x), self.ln_kv(text)
        out = self.cross_attn(x, text, text, key_padding_mask=~mask)[0]
        return (self.prob_proj(self.ln_post(out)).squeeze(-1) / temperature).softmax(-1)


def keep(p: Tensor, top_p: float) -> Tensor:
    """The released rule, with the released loop's order."""
    ordered, index = torch.sort(p, descending=True)
    chosen = (torch.cumsum(ordered, 0) <= top_p).nonzero().squeeze(1)
    chosen = index[: len(chosen) + 1] if len(chosen) < len(index) else index
    return chosen.sort().values
