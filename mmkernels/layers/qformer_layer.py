"""One layer of a Q-Former, and what a Q-Former is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers.mlp import MLP
from mmkernels.primitives.interval_attention import interval_attention

KeysValues = tuple[Tensor, Tensor]  # each [B, keys, H, D]


@dataclass(frozen=True)
class QFormerConfig:
    """A BERT of `layers` post-norm layers whose queries cross-attend to the image in layers 0, `cross_every`, ...

    `vocab=0` leaves out everything that only text needs: embeddings, the text feed-forwards and the language-model head, as
    BLIP-2's second stage and XComposer do; `text_head=False` the head alone, as InstructBLIP and LLaMA-VID do.
    """

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    image_width: int = 1408
    num_query: int = 32
    vocab: int = 30_523
    max_positions: int = 512
    cross_every: int = 2
    dropout: float = 0.1
    eps: float = 1e-12
    text_head: bool = True

    @property
    def crossing(self) -> range:
        """The layers that cross-attend."""
        return range(0, self.layers, self.cross_every)


class Keys(NamedTuple):
    """Keys and values, each `[B, keys, H, D]`, and the interval of them that every row sees, int32 `[B, rows]`."""

    k: Tensor
    v: Tensor
    lo: Tensor
    hi: Tensor


class QFormerLayer(nn.Module):
    """`s = norm(x + self_attention(x))`; queries `s = norm(s + cross_attention(s, image))`; `norm(s + ffn(s))`.

    Queries and text share the self-attention; each has a feed-forward of its own.
    """

    def __init__(self, config: QFormerConfig, *, crosses: bool) -> None:
        super().__init__()
        c = self.config = config
        self.attention = nn.ModuleDict(
            {"qkv": nn.Linear(c.hidden, 3 * c.hidden), "out": nn.Linear(c.hidden, c.hidden)}
        )
        self.attention_norm = nn.LayerNorm(c.hidden, c.eps)
        if crosses:
            self.cross = nn.ModuleDict(
                {"q": nn.Linear(c.hidden, c.hidden), "out": nn.Linear(c.hidden, c.hidden)}
            )
            self.cross_norm = nn.LayerNorm(c.hidden, c.eps)
        self.query_ffn = MLP(c.hidden, c.ffn)
        self.query_norm = nn.LayerNorm(c.hidden, c.eps)
        if c.vocab:
            self.text_ffn = MLP(c.hidden, c.ffn)
            self.text_norm = nn.LayerNorm(c.hidden, c.eps)

    def forward(
        self,
        x: Tensor,
        queries: int,
        seen: tuple[Tensor, Tensor],
        image: Keys | None,
        past: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """x `[B, R, C]`, its first `queries` rows being queries; returns the same and the layer's keys and values."""
        q, k, v = self.attention["qkv"](x).unflatten(-1, (3, self.config.heads, -1)).unbind(2)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        x = self.attention_norm(x + self._drop(self.attention["out"](self._attend(q, Keys(k, v, *seen)))))
        query, text = x[:, :queries], x[:, queries:]
        if queries and image is not None:
            q = self.cross["q"](query).unflatten(-1, (self.config.heads, -1))
            query = self.cross_norm(query + self._drop(self.cross["out"](self._attend(q, image))))
        parts = []
        if queries:
            parts.append(self.query_norm(query + self._drop(self.query_ffn(query))))
        if text.shape[1] or not queries:
            parts.append(self.text_norm(text + self._drop(self.text_ffn(text))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), (k, v)

    def _attend(self, q: Tensor, keys: Keys) -> Tensor:
        """q `[B, R, H, D]` -> `[B, R, H D]`. In training, probabilities drop out by a seed that torch's generator gives."""
        p, seed = (self.config.dropout if self.training else 0.0), None
        if p:
            seed = torch.randint(2**62, (1,), device=q.device)
        q, k, v = (t.transpose(1, 2) for t in (q, keys.k, keys.v))
        o = interval_attention(q, k, v, keys.lo, keys.hi, dropout_p=p, seed=seed)
        return o.transpose(1, 2).flatten(2)  # type: ignore[union-attr]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)
