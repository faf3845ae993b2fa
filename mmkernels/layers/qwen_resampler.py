"""Qwen-VL's adapter: one cross-attention whose queries and keys know where they are, whose values do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._derived import Derived
from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.positions import check_grid, interpolate_positions, sincos_positions
from mmkernels.primitives import _autocast, _check
from mmkernels.primitives.interval_attention import interval_attention

_EPS = 1e-6


class QwenResampler(nn.Module):
    """`grid^2` learned queries read an image's tokens once; no residual, no feed-forward.

    `c = LN(kv x)`, `Q = Wq (LN(query) + P) + bq`, `K = Wk (c + P_M) + bk`, `V = Wv c + bv`,
    `r = Wo softmax(Q K^T / sqrt(D)) V + bo`. P is a fixed 2-D sin-cos table (a buffer: stored, never trained), P_M the same
    table stretched to the image's grid. `kv` is left out where the image tokens already have the resampler's width.

    While no gradients are recorded, Q is computed once for each update of the weights. Whoever writes weights in place through
    `.data` has to call `train()` or `eval()` afterwards: that leaves no other trace.

    **Source** Qwen-VL (arXiv 2308.12966) 2.1; weights of `qwen_vl`, `monkey` load by `weights.load`.
    """

    sources = ("qwen_vl", "monkey")
    positions: Tensor

    def __init__(self, grid: int, width: int, heads: int, media_width: int | None = None) -> None:
        super().__init__()
        media_width = width if media_width is None else media_width
        _check.positive(grid=grid, width=width, heads=heads, media_width=media_width)
        if width % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of width = {width}")
        self.heads, self.media_width = heads, media_width
        self.query = nn.Parameter(torch.empty(grid**2, width))
        self.register_buffer("positions", sincos_positions(width, grid).to(self.query.dtype))
        self.kv = nn.Identity() if media_width == width else nn.Linear(media_width, width, bias=False)
        self.query_norm = nn.LayerNorm(width, _EPS)
        self.media_norm = nn.LayerNorm(width, _EPS)
        self.qkv = nn.Linear(width, 3 * width)  # rows [Wq; Wk; Wv]
        self.out = nn.Linear(width, width)
        self._queries = Derived()
        self._initialize()

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in (self.kv, self.out):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.qkv.weight)
        for linear in (self.qkv, self.out):
            nn.init.zeros_(linear.bias)

    def train(self, mode: bool = True) -> QwenResampler:
        self._queries.forget()
        return super().train(mode)

    def forward(
        self, x: Tensor, *, grid_hw: tuple[int, int] | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Reads every image into `grid^2` tokens.

        **Shapes** x `[B, M, media_width]`, row by row; `grid_hw` its (height, width), a square unless given; attn_mask
        `[grid^2, M]` or `[B * heads, grid^2, M]` as torch's MultiheadAttention takes it. Returns `[B, grid^2, width]`.
        **Dtypes** the parameters'; attn_mask bool, True where a query must not look, or floating, added to the scores.
        **Gradient** x and every parameter. **Edge** no images: `[0, grid^2, width]`; a query that may look nowhere gets the
        bias of `out` alone; tokens that no query may look at can hold anything, NaN included.
        **Raises** ValueError for shapes and for tokens that are no square without `grid_hw`; TypeError for dtypes.
        **Speed** `interval_attention` without a mask, and with one that leaves every query one run of tokens (which only CPUs
        look for: it reads the mask); with any other, plain PyTorch with all scores in memory.
        """
        b, m, _ = self._check(x)
        grid = _grid(m, grid_hw)
        mask = None if attn_mask is None else self._mask(attn_mask, b, m)
        if mask is not None:  # a weight's gradient would meet NaN there as 0 * NaN
            x = torch.where(_seen(mask).any(2).any(1).unsqueeze(-1), x, 0)
        width = self.query.shape[1]
        c = self.media_norm(self.kv(x))
        weight, bias = self.qkv.weight.split((width, 2 * width)), self.qkv.bias.split((width, 2 * width))
        (wk, wv), (bk, bv) = weight[1].chunk(2), bias[1].chunk(2)
        k = F.linear(c + interpolate_positions(self.positions, grid), wk, bk)
        v = F.linear(c, wv, bv)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (self.queries(), k, v))
        q = q.expand(b, -1, -1, -1)
        if mask is None:
            o = _run_attention(q, k, v, *_everything(b, q.shape[2], m, x.device))
        elif (runs := _runs(mask)) is not None:
            o = _run_attention(q, k, v, *runs)
        else:
            o = _masked_attention(q, k, v, mask)
        return self.out(o.transpose(1, 2).flatten(2))

    def queries(self) -> Tensor:
        """Q `[grid^2, width]`: it knows no image."""
        parameters = (
            self.query, self.positions, self.query_norm.weight, self.query_norm.bias, self.qkv.weight, self.qkv.bias,
        )  # fmt: skip
        return self._queries(self._project_queries, *parameters)

    def _project_queries(self) -> Tensor:
        width = self.query.shape[1]
        return F.linear(
            self.query_norm(self.query) + self.positions, self.qkv.weight[:width], self.qkv.bias[:width]
        )

    def _check(self, x: Tensor) -> torch.Size:
        _check.shapes(x=(x, f"B M {self.media_width}"))
        if _autocast.dtype(x.device.type) is None:
            _check.dtypes((self.query.dtype,), x=x)
        return x.shape

    def _mask(self, mask: Tensor, b: int, m: int) -> Tensor:
        """[1 or B, 1 or H, grid^2, M]."""
        rows = self.query.shape[0]
        _check.dtypes((torch.bool, *_check.FLOATS), attn_mask=mask)
        if mask.dim() == 2:
            _check.shapes(attn_mask=(mask, f"{rows} {m}"))
            return mask[None, None]
        _check.shapes(attn_mask=(mask, f"{b * self.heads} {rows} {m}"))
        return mask.unflatten(0, (b, self.heads))

    def published(self, source: str) -> Table:
        """Where the authors' files keep the resampler's parameters; both use the same names."""
        return _TABLE


def _grid(tokens: int, grid_hw: tuple[int, int] | None) -> tuple[int, int]:
    if grid_hw is None:
        side = int(tokens**0.5)  # exact for squares; a compiler knows no isqrt
        if side * side != tokens or side == 0:
            raise ValueError(
                f"x: got {tokens} tokens, which are no square grid; expected grid_hw=(height, width) with it"
            )
        return side, side
    height, width = check_grid(grid_hw)
    if height * width != tokens:
        raise ValueError(f"grid_hw: got {height} x {width}, expected a grid of x's {tokens} tokens")
    return height, width


def _seen(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask != -torch.inf


def _everything(b: int, rows: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    lo = torch.zeros(b, 1, rows, dtype=torch.int32, device=device)
    return lo, torch.full_like(lo, m)


def _runs(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where every query sees one run of tokens: from and to, int32 `[1 or B, 1 or H, rows]`; else, or unlooked at, None.

    Looking at values would make a GPU's host wait.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or mask.requires_grad:
        return None
    seen = _seen(mask)
    if mask.dtype != torch.bool and bool((seen & (mask != 0)).any()):
        return None  # a bias
    marked, count = seen.to(torch.int8), seen.sum(-1, dtype=torch.int32)
    lo = marked.argmax(-1).int()
    hi = mask.shape[-1] - marked.flip(-1).argmax(-1).int()
    if bool(((hi - lo != count) & (count > 0)).any()):
        return None
    return lo, torch.where(count > 0, hi, lo)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` of `[B, H, rows, D]`, every row over its run; lo and hi as `_runs` gives them."""
    (b, h), rows = q.shape[:2], lo.shape[2]
    if lo.shape[1] == 1:
        lo, hi = (t[:, 0].expand(b, rows).contiguous() for t in (lo, hi))
        return interval_attention(q, k, v, lo, hi)  # type: ignore[return-value]
    lo, hi = (t.expand(b, h, rows).reshape(b * h, rows) for t in (lo, hi))
    q, k, v = (t.flatten(0, 1).unsqueeze(1) for t in (q, k, v))
    return interval_attention(q, k, v, lo, hi).view(b, h, rows, v.shape[-1])  # type: ignore[union-attr]


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` of `[B, H, rows, D]` with any mask, in float32 at least; a row without keys gives 0."""
    with _autocast.off(q.device.type):
        wide = torch.promote_types(v.dtype, torch.float32)
        seen = _seen(mask)
        scores = q.to(wide) @ k.to(wide).transpose(2, 3) * q.shape[-1] ** -0.5
        if mask.dtype != torch.bool:
            scores = scores + torch.where(seen, mask, 0).to(wide)
        p = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
        return (p @ v.to(wide)).to(v.dtype)


_TABLE = Table(
    (
        *(Rule(ours, (theirs,)) for ours, theirs in (("query", "query"), ("positions", "pos_embed"))),
        *renames(kv="kv_proj", query_norm="ln_q", media_norm="ln_kv", out="attn.out_proj"),
        Rule(r"qkv\.(weight|bias)", ("attn.in_proj_{0}",)),
    ),
    within="transformer.visual.attn_pool.",
)
