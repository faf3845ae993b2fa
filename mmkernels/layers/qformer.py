"""The Q-Former: learned queries read an image, and speak with text, inside one BERT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.qformer_layer import Keys, KeysValues, QFormerConfig, QFormerLayer
from mmkernels.layers.qformer_tables import SOURCES, qformer_table
from mmkernels.ops.resampler import qformer_intervals
from mmkernels.primitives import _check


class QFormer(nn.Module):
    """Learned queries that attend to an image, to themselves and, depending on the mode, to a text and back.

    | mode | queries see | text sees |
    |---|---|---|
    | `queries` | the image, queries | |
    | `itc` | the image, queries | the text |
    | `itg` | the image, queries | queries, the text up to itself |
    | `itm`, `instruct` | the image, queries, the text | queries, the text |

    The image's keys and values of all layers are one product. Text padding may stand on any side: tokens are brought into an
    order in which every row sees one run of keys, once, and back at the end.

    **Source** BLIP-2 (arXiv 2301.12597), InstructBLIP (arXiv 2305.06500), InternLM-XComposer (arXiv 2309.15112); weights of
    `lavis`, `lavis_instruct`, `xcomposer`, `huggingface` load by `weights.load`. **Speed** `mmkernels bench --op resampler`.
    """

    sources = SOURCES

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        c = self.config = config
        _check.positive(
            hidden=c.hidden, layers=c.layers, heads=c.heads, num_query=c.num_query, cross_every=c.cross_every
        )
        if c.hidden % c.heads:
            raise ValueError(f"heads: got {c.heads}, expected a divisor of hidden = {c.hidden}")
        self.query_tokens = nn.Parameter(torch.empty(c.num_query, c.hidden))
        self.norm = nn.LayerNorm(c.hidden, c.eps)
        self.image_kv = nn.Linear(c.image_width, len(c.crossing) * 2 * c.hidden)
        self.layers = nn.ModuleList(QFormerLayer(c, crosses=i in c.crossing) for i in range(c.layers))
        if c.vocab:
            self.embedding = nn.Embedding(c.vocab, c.hidden)
            self.position_embedding = nn.Embedding(c.max_positions, c.hidden)
        if c.vocab and c.text_head:
            self.lm_dense = nn.Linear(c.hidden, c.hidden)
            self.lm_norm = nn.LayerNorm(c.hidden, c.eps)
            self.lm_bias = nn.Parameter(torch.zeros(c.vocab))
        self._initialize()

    def _initialize(self) -> None:
        """BERT's: every matrix from N(0, `std`), biases 0."""
        nn.init.normal_(self.query_tokens, std=self.config.std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        image: Tensor | None,
        *,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        mode: str = "queries",
        cache: list[KeysValues] | None = None,
    ) -> Tensor:
        """Hidden states of the query rows, then of the text rows.

        **Shapes** image `[B, M, image_width]`; text_ids `[B, L]`; masks bool, True at what counts: text_mask `[B, L]`,
        image_mask `[B, M]`, None for all of it. Returns `[B, num_query + L, hidden]`; without an image (mode "itc", or "itg"
        with a cache) only the text rows, without text only the query rows.
        `cache`: an empty list, which the mode "queries" fills with every layer's keys and values of the queries; the mode
        "itg" with that list and without an image then runs the text alone, to the same result as both at once.
        **Dtypes** the parameters'; ids int64 or int32. **Gradient** image and every parameter, also through the cache.
        **Edge** an image (or text in "itc") masked altogether is not seen: exactly zero attention; padding may hold anything,
        NaN included. In training, dropout follows torch's generator. **Raises** ValueError for shapes, modes, missing inputs,
        ids out of range (on CPU) and too long texts; TypeError for dtypes.
        """
        self._check(image, text_ids, text_mask, image_mask, mode, cache)
        text_ids = None if text_ids is None else self._readable(text_ids, text_mask)
        queries = 0 if image is None else self.config.num_query
        past = cache if mode == "itg" and image is None else None
        hidden, seen, order = self._embed(
            image, text_ids, text_mask, mode, 0 if past is None else self.config.num_query
        )
        keys = [None] * self.config.layers if image is None else self._image_keys(image, image_mask)
        made = []
        for i, layer in enumerate(self.layers):
            hidden, kv = layer(hidden, queries, seen, keys[i], None if past is None else past[i])
            made.append(kv)
        if cache is not None and past is None:
            cache.extend(made)
        if order is None:
            return hidden
        place = torch.zeros_like(order).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return hidden.gather(1, place.unsqueeze(-1).expand_as(hidden))

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` of text rows `[..., hidden]`: `norm(gelu(dense h)) E^T + bias`, E the embedding."""
        return F.linear(self.lm_norm(F.gelu(self.lm_dense(hidden))), self.embedding.weight, self.lm_bias)

    def _embed(
        self, image: Tensor | None, ids: Tensor | None, mask: Tensor | None, mode: str, past: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """The first hidden states in key order, what each row sees, and the order of the rows (None: as they are)."""
        queries, order, parts = 0 if image is None else self.config.num_query, None, []
        if image is not None:
            parts.append(self.query_tokens.expand(image.shape[0], -1, -1))
            whole = torch.ones(image.shape[0], 0, dtype=torch.bool, device=image.device)
        if ids is not None:
            whole = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        seen = qformer_intervals("itm" if mode == "queries" else mode, queries + past, whole)
        lo, hi = seen.lo, seen.hi
        if ids is not None:
            position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            if mask is not None:
                lo, hi = seen.in_order()
                order = seen.order[:, past:] - past
                position = order[:, queries:] - queries
                ids = ids.gather(1, position)
            parts.append(self.embedding(ids) + self.position_embedding(position))
        x = self.norm(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return F.dropout(x, self.config.dropout, self.training), (lo[:, past:], hi[:, past:]), order

    def _image_keys(self, image: Tensor, mask: Tensor | None) -> list[Keys | None]:
        """For every layer that looks at the image its keys and values, all by one product."""
        c, (b, tokens, _) = self.config, image.shape
        if mask is None:
            end = torch.full((b, 1), tokens, dtype=torch.int32, device=image.device)
        else:  # what is hidden goes to the end, and is zeroed: a weight's gradient would meet it as 0 * NaN
            order = qformer_intervals("itm", 0, mask).order
            image = torch.where(mask.unsqueeze(-1), image, 0).gather(1, order.unsqueeze(-1).expand_as(image))
            end = mask.sum(1, keepdim=True, dtype=torch.int32)
        hi = end.expand(b, c.num_query).contiguous()
        flat = self.image_kv(image).unflatten(-1, (-1, c.heads, c.hidden // c.heads)).unbind(2)
        keys: list[Keys | None] = [None] * c.layers
        for i, k, v in zip(c.crossing, flat[::2], flat[1::2], strict=True):
            keys[i] = Keys(k, v, torch.zeros_like(hi), hi)
        return keys

    def _check(
        self,
        image: Tensor | None,
        text_ids: Tensor | None,
        text_mask: Tensor | None,
        image_mask: Tensor | None,
        mode: str,
        cache: list[KeysValues] | None,
    ) -> None:
        c = self.config
        _check.choice("mode", mode, ("queries", "itc", "itg", "itm", "instruct"))
        _check.shapes(
            image=(image, f"B M {c.image_width}"), image_mask=(image_mask, "B M"), text_ids=(text_ids, "B L"),
            text_mask=(text_mask, "B L"),
        )  # fmt: skip
        _check.dtypes((torch.bool,), image_mask=image_mask, text_mask=text_mask)
        _check.dtypes((torch.int64, torch.int32), text_ids=text_ids)
        alone = image is None and mode == "itg" and bool(cache)  # the second of the two passes
        if cache is not None and not alone and (mode != "queries" or cache):
            raise ValueError(
                f'cache: got one of {len(cache)} layers in mode {mode!r}, expected an empty one in "queries" to fill, or a '
                'filled one in "itg" without an image'
            )
        if mode == "queries" and (text_ids is not None or text_mask is not None):
            raise ValueError('text_ids: got text in mode "queries", expected None')
        if text_ids is None and (mode in ("itg", "itm", "instruct") or text_mask is not None):
            raise ValueError(f"text_ids: got None in mode {mode!r}, expected token ids [B, L]")
        if image is None and not alone and (mode != "itc" or text_ids is None):
            raise ValueError(
                f"image: got None in mode {mode!r}, expected image tokens [B, M, {c.image_width}]"
            )
        if text_ids is not None:
            self._check_text(text_ids)

    def _check_text(self, ids: Tensor) -> None:
        c = self.config
        if not c.vocab:
            raise ValueError("text_ids: got text, expected None: this Q-Former has no text branch (vocab=0)")
        if ids.shape[1] > c.max_positions:
            raise ValueError(
                f"text_ids: got {ids.shape[1]} tokens, expected at most max_positions = {c.max_positions}"
            )

    def _readable(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Ids that can be looked up: what padding holds is brought into range, other ids have to be in it."""
        c = self.config
        ids = ids if mask is None else torch.where(mask, ids, ids.clamp(0, c.vocab - 1))
        if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            return ids  # looking at values would make the host wait
        if not 0 <= int(ids.min()) <= int(ids.max()) < c.vocab:
            raise ValueError(
                f"text_ids: got ids {int(ids.min())} to {int(ids.max())}, expected 0 to {c.vocab - 1}"
            )
        return ids

    def published(self, source: str) -> Table:
        """Where the authors' files keep the Q-Former's parameters."""
        return qformer_table(source, self.config.crossing)
