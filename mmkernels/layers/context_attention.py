"""LLaMA-VID's context attention: a frame becomes one token that answers the text, and a few that keep its content."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.qformer import QFormer
from mmkernels.layers.qformer_layer import QFormerConfig
from mmkernels.primitives import _check

# what the authors' files keep beside the connector: the language model and the tower
NEIGHBOURS = r"(embed_tokens|layers|norm|vision_tower)\..*"


def content_grid(compress: str, patches: int) -> tuple[int, int]:
    """How `compress` pools a frame of `patches`: (s, t), squares of s x s patches on a t x t grid.

    "grid:g" has `s = floor(n / g)` on the n x n patches and `t = floor(n / s)`, which g divides n or not: rows and columns
    past `s t` are dropped, and t may be more than g.
    **Raises** ValueError for other modes, for patches that are no square, and for g below 2 or above n.
    """
    g = _grid(compress)
    n = math.isqrt(max(patches, 0))
    if n * n != patches or n == 0:
        raise ValueError(f"patches: got {patches} patches a frame, expected a square number for {compress!r}")
    if g > n:
        raise ValueError(f"compress: got {compress!r} for {n} x {n} patches, expected a grid of at most {n}")
    return n // g, n // (n // g)


def content_tokens(compress: str, patches: int) -> int:
    """Content tokens of a frame of `patches`; the context token is one more. **Raises** ValueError as `content_grid`."""
    if patches < 1:
        raise ValueError(f"patches: got {patches} patches a frame, expected 1 or more")
    if _grid(compress):
        return content_grid(compress, patches)[1] ** 2
    return patches if compress == "none" else 1


def _grid(compress: str) -> int:
    """The g of "grid:g"; 0 for the other modes."""
    if compress in ("none", "mean"):
        return 0
    kind, _, size = compress.partition(":") if isinstance(compress, str) else ("", "", "")
    if kind != "grid" or not size.isascii() or not size.isdigit() or int(size) < 2:
        raise ValueError(
            f'compress: got {compress!r}, expected "none", "mean" or "grid:N" with N of 2 or more'
        )
    return int(size)


class ContextAttention(nn.Module):
    """Text and frame meet in a Q-Former; its queries weigh the frame's patches into one token, pooling makes the others.

    `c = mean_q(softmax(Q K^T / sqrt(C)) X)`, `K = X Wk^T + bk`, X the patches as the tower gave them; the context token is
    `Wv c + bv`, content tokens are `W2 gelu(W1 pool(X))`. Neither K nor a value of every query is formed: scores are
    `(Q Wk) X^T + Q bk` where that is less work, and `c = (mean_q A) X`. Frames run in blocks of `block`, so the workspace does
    not grow with their number.

    `compress`: "none" keeps all patches, "mean" one token, "grid:N" about N x N (see `content_grid`). `select="patch"` takes
    the first token of a frame with an odd number of tokens for a class token, which only the Q-Former reads; "all" takes every
    token for a patch.

    **Source** LLaMA-VID (arXiv 2311.17043); weights of `llama_vid` load by `weights.load`.
    **Speed** `python -m benchmarks.frames`.
    """

    sources = ("llama_vid",)

    def __init__(
        self,
        width: int,
        lm_width: int,
        *,
        qformer: QFormerConfig | None = None,
        compress: str = "mean",
        select: str = "patch",
        block: int = 64,
    ) -> None:
        super().__init__()
        config = QFormerConfig(image_width=width, text_head=False) if qformer is None else qformer
        _check.positive(width=width, lm_width=lm_width, block=block)
        _check.choice("select", select, ("patch", "all"))
        _grid(compress)
        if config.image_width != width:
            raise ValueError(f"qformer: got image_width = {config.image_width}, expected width = {width}")
        self.compress, self.select, self.block = compress, select, block
        self.norm = nn.LayerNorm(width)
        self.qformer = QFormer(config)
        self.query = nn.Linear(config.hidden, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, lm_width)
        self.content_up = nn.Linear(width, lm_width)
        self.content_down = nn.Linear(lm_width, lm_width)

    def forward(
        self,
        frames: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | None = None,
        *,
        tower: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Every prompt of a sample over every frame of it.

        **Shapes** frames `[B, F, M, C]`, the tower's tokens with or without class token (or, with `tower`, whatever that turns
        into them, `[N, ...]` -> `[N, M, C]`: it then runs block by block too); text_ids `[B, P, L]`, text_mask bool of the
        same shape, True at text. Returns `[B, P, F, 1 + content, lm_width]`, the context token first.
        **Dtypes** the parameters'; ids int64 or int32. **Gradient** frames and every parameter.
        **Edge** no frames or no prompts give no tokens; text padding may hold anything, ids out of range too; every `block`
        gives the same result, up to the order of sums.
        **Raises** ValueError for shapes, empty frames, too long text; TypeError for dtypes.
        """
        size = _check.shapes(text_ids=(text_ids, "B P L"), text_mask=(text_mask, "B P L"))
        _check.dtypes((torch.bool,), text_mask=text_mask)
        if frames.dim() < 3 or frames.shape[0] != size["B"]:
            raise ValueError(
                f"frames: got shape {tuple(frames.shape)}, expected [B, F, M, C] with B = {size['B']}"
            )
        count, flat = frames.shape[1], frames.flatten(0, 1)
        if (
            text_mask is not None
        ):  # hidden rows are not read, but weights' gradients would meet them as 0 * NaN
            first = text_ids.gather(2, text_mask.to(torch.int8).argmax(2, keepdim=True))
            text_ids = torch.where(text_mask, text_ids, torch.where(text_mask.any(2, keepdim=True), first, 0))
        blocks = []
        for start in range(0, max(len(flat), 1), self.block):
            x = flat[start : start + self.block]
            x = x if tower is None else tower(x).to(self.key.weight.dtype)  # a frozen tower may be narrow
            sample = torch.arange(start, start + len(x), device=x.device) // max(count, 1)
            blocks.append(self._block(x, text_ids[sample], None if text_mask is None else text_mask[sample]))
        tokens = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return tokens.unflatten(0, (size["B"], count)).transpose(1, 2)

    def _block(self, x: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """x `[N, M, C]`, ids `[N, P, L]` -> `[N, P, 1 + content, lm_width]`."""
        _check.shapes(frames=(x, f"N M {self.key.in_features}"))
        patches = x[:, 1:] if self.select == "patch" and x.shape[1] % 2 else x
        content, normed = self.pool(patches), self.norm(x)
        tokens = []
        for p in range(ids.shape[1]):
            text = {"text_ids": ids[:, p], "text_mask": None if mask is None else mask[:, p]}
            hidden = self.qformer(normed, mode="instruct", **text)[:, : self.qformer.config.num_query]
            tokens.append(torch.cat([self.context(self.query(hidden), patches), content], 1))
        if not tokens:
            return content.new_empty(len(x), 0, 1 + content.shape[1], content.shape[2])
        return torch.stack(tokens, 1)

    def attend(self, text_queries: Tensor, patches: Tensor) -> Tensor:
        """A frame's tokens from its text queries: `[context, content ...]`.

        **Shapes** text_queries `[N, Q, C]`, rows of the Q-Former that `query` has projected, as the authors' code has it; rows
        of the Q-Former's own width (where it is another) are projected first. patches `[N, M, C]`, without class token.
        Returns `[N, 1 + content, lm_width]`. **Dtypes** the parameters'. **Gradient** both and the parameters used.
        **Raises** ValueError for shapes and empty frames.
        """
        c, hidden = self.key.in_features, self.query.in_features
        if text_queries.dim() == 3 and text_queries.shape[-1] == hidden != c:
            text_queries = self.query(text_queries)
        _check.shapes(text_queries=(text_queries, f"N Q {c}"), patches=(patches, f"N M {c}"))
        blocks = []
        for start in range(0, max(len(patches), 1), self.block):
            q, x = (t[start : start + self.block] for t in (text_queries, patches))
            blocks.append(torch.cat([self.context(q, x), self.pool(x)], 1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def context(self, q: Tensor, x: Tensor) -> Tensor:
        """The context token `[N, 1, lm_width]` of q `[N, Q, C]` over x `[N, M, C]`."""
        if q.shape[1] == 0 or x.shape[1] == 0:
            raise ValueError(
                f"text_queries, patches: got {q.shape[1]} queries and {x.shape[1]} patches, expected 1 or more of each"
            )
        scale = x.shape[-1] ** -0.5
        if q.shape[1] <= x.shape[1]:  # the key projection passes over to the fewer rows
            shift = (q @ self.key.bias).unsqueeze(-1)
            scores = torch.baddbmm(shift, q @ self.key.weight, x.mT, beta=scale, alpha=scale)
        else:
            scores = torch.bmm(q, self.key(x).mT) * scale
        weights = scores.softmax(-1).mean(1, keepdim=True)
        return self.value(torch.bmm(weights.to(x.dtype), x))

    def pool(self, x: Tensor) -> Tensor:
        """The content tokens of patches `[N, M, C]`: pooled first, projected then."""
        tokens = content_tokens(self.compress, x.shape[1])
        if _grid(self.compress):
            n = math.isqrt(x.shape[1])
            s, t = content_grid(self.compress, x.shape[1])
            square = x.unflatten(1, (n, n))[:, : s * t, : s * t]
            x = square.unflatten(2, (t, s)).unflatten(1, (t, s)).mean((2, 4)).flatten(1, 2)
        elif self.compress == "mean":
            x = x.mean(1, keepdim=True)
        assert x.shape[1] == tokens
        return self.content_down(F.gelu(self.content_up(x)))

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters: beside the language model's, under `model.`."""
        bert = self.qformer.published("lavis_instruct")
        rules = tuple(rule for rule in bert.rules if rule.ours != "query_tokens")
        table = Table(rules, bert.absent, bert.ignored).under("qformer.", "vlm_att_encoder.")
        own = renames(
            norm="vlm_att_ln", query="vlm_att_projector", key="vlm_att_key_projector", value="vlm_att_val_projector",
            content_up="mm_projector.0", content_down="mm_projector.2",
        )  # fmt: skip
        queries = Rule(r"qformer\.query_tokens", ("vlm_att_query",), lambda t: t.flatten(0, 1))
        return Table(
            (*table.rules, *own, queries), table.absent, (*table.ignored, NEIGHBOURS), within="model."
        )
