"""SliME's router: which of the slices' tokens a text is about, and no more of them than say most of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.primitives import _check
from mmkernels.primitives.interval_attention import interval_attention

KINDS = ("cosine", "qformer")
_NOISE, _HEAD, _EPS = 0.1, 128, 1e-8


class TextGuidedRouter(nn.Module):
    """Keeps the image tokens whose probabilities `p = softmax(s / temperature)` first reach `top_p`, and one more.

    - `cosine`: `s_i = sum_j cos(v_i, t_j)` over the text's tokens (their mean where no mask is given); no parameters.
    - `qformer`: `s = softmax(W2 relu(W1 LN(MHA(LN(v), LN(t)))) / temperature)`: image tokens read the text, heads of 128.

    Training adds 0.1 N(0, 1) to s. p is sorted and summed in float32 at least: sums `<= top_p` count, the next one too.
    `scores` are s of the last pass `[V]`, `probabilities` p.

    **Source** SliME (arXiv 2406.08487); weights of `slime` load by `weights.load` ("qformer").
    """

    sources = ("slime",)

    def __init__(self, kind: str, width: int, top_p: float = 0.95, temperature: float = 1.0) -> None:
        super().__init__()
        _check.choice("kind", kind, KINDS)
        _check.positive(width=width)
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p: got {top_p}, expected 0 to 1")
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, expected a positive number")
        self.kind, self.width, self.top_p, self.temperature = kind, width, top_p, temperature
        self.scores: Tensor | None = None
        self.probabilities: Tensor | None = None
        if kind == "qformer":
            self.heads = max(1, width // _HEAD)
            if width % self.heads:
                raise ValueError(f"width: got {width}, expected a multiple of {self.heads} heads")
            self.norm, self.text_norm, self.post_norm = (nn.LayerNorm(width) for _ in range(3))
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.score = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 1))
            self._initialize()

    def _initialize(self) -> None:
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        for linear in (self.out, *self.score):
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(
        self, tokens: Tensor, text: Tensor, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The indices of the tokens that are kept, ascending.

        **Shapes** tokens `[V, width]` of one sample's slices, text `[T, width]` embeddings, mask bool `[T]`, True at text;
        noise `[V]` instead of N(0, 1) in training. Returns int64 `[K]`, 1 <= K <= V.
        **Dtypes** tokens and text alike. **Gradient** none: which are kept is no function to differentiate; take the rows.
        **Edge** no tokens give no indices; `top_p` 1 may leave out the last when the sums round up to more than 1 before it;
        a text without tokens makes all alike.
        **Raises** ValueError for shapes; TypeError for dtypes. **Speed** K is a number that the host waits for. Cosines are
        summed as one product with the sum of unit vectors, not token by token.
        """
        size = _check.shapes(
            tokens=(tokens, f"V {self.width}"),
            text=(text, f"T {self.width}"),
            mask=(mask, "T"),
            noise=(noise, "V"),
        )
        _check.dtypes(_check.FLOATS, tokens=tokens, text=text)
        _check.dtypes((torch.bool,), mask=mask)
        with torch.no_grad():
            s = self._cosine(tokens, text, mask) if self.kind == "cosine" else self._read(tokens, text, mask)
            if noise is None and self.training:
                noise = torch.randn_like(s)
            self.scores = s if noise is None else s + _NOISE * noise.to(s.dtype)
            self.probabilities = p = (self.scores / self.temperature).softmax(-1)
            ordered, index = p.sort(descending=True, stable=True)
            kept = min(int((ordered.cumsum(0) <= self.top_p).sum()) + 1, size["V"])
            return index[:kept].sort().values

    def _cosine(self, tokens: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        tokens, text = _unit(tokens), _unit(text)
        if mask is None:
            return tokens @ (text.sum(0) / max(1, len(text)))
        return tokens @ torch.where(mask[:, None], text, 0).sum(0)

    def _read(self, tokens: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            text = text[mask]
        (wq, wkv), (bq, bkv) = (
            t.split((self.width, 2 * self.width)) for t in (self.qkv.weight, self.qkv.bias)
        )
        q = F.linear(self.norm(tokens), wq, bq)
        k, v = F.linear(self.text_norm(text), wkv, bkv).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        lo = torch.zeros(len(q), dtype=torch.int32, device=q.device)
        o = interval_attention(q, k, v, lo, torch.full_like(lo, len(k)))
        s = self.score(self.post_norm(self.out(o.flatten(1)))).squeeze(-1)  # type: ignore[union-attr]
        return (s.to(torch.promote_types(s.dtype, torch.float32)) / self.temperature).softmax(-1)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters; of a router without any, nothing is read."""
        rules = (
            *renames(norm="ln_q", text_norm="ln_kv", post_norm="ln_post", out="cross_attn.out_proj"),
            Rule(r"qkv\.(weight|bias)", ("cross_attn.in_proj_{0}",)),
            Rule(r"score\.(\d)\.(weight|bias)", ("prob_proj.{0}.{1}",)),
        )
        return Table(rules, ignored=("query", r"self_attn\..*"), within="model.sampler.selector.")


def _unit(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True).clamp(min=_EPS)
