"""The Q-Former's published computation, written out densely: additive masks, one product at a time, LAVIS' names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.layers import QFormerConfig

CONFIG = QFormerConfig(
    hidden=16,
    layers=3,
    heads=2,
    ffn=24,
    image_width=12,
    num_query=3,
    vocab=20,
    max_positions=9,
    cross_every=2,
)
State = dict[str, Tensor]


def lavis_state(config: QFormerConfig = CONFIG, seed: int = 0) -> State:
    """Random parameters under LAVIS' names, in float64."""
    random = torch.Generator().manual_seed(seed)
    c, state = config, {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(
            rows, columns, generator=random, dtype=torch.float64
        ) / math.sqrt(columns)
        state[f"{name}.bias"] = torch.randn(rows, generator=random, dtype=torch.float64) / 4

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(c.hidden, generator=random, dtype=torch.float64) / 4
        state[f"{name}.bias"] = torch.randn(c.hidden, generator=random, dtype=torch.float64) / 4

    state["query_tokens"] = torch.randn(1, c.num_query, c.hidden, generator=random, dtype=torch.float64)
    norm("bert.embeddings.LayerNorm")
    for i in range(c.layers):
        at = f"bert.encoder.layer.{i}"
        for kind in ("attention", "crossattention")[: 1 + (i % c.cross_every == 0)]:
            for part in ("query", "key", "value"):
                wide = c.image_width if kind == "crossattention" and part != "query" else c.hidden
                linear(f"{at}.{kind}.self.{part}", c.hidden, wide)
            linear(f"{at}.{kind}.output.dense", c.hidden, c.hidden)
            norm(f"{at}.{kind}.output.LayerNorm")
        for suffix in ("_query", "")[: 1 + bool(c.vocab)]:
            linear(f"{at}.intermediate{suffix}.dense", c.ffn, c.hidden)
            linear(f"{at}.output{suffix}.dense", c.hidden, c.ffn)
            norm(f"{at}.output{suffix}.LayerNorm")
    if c.vocab:
        for name, rows in (("word", c.vocab), ("position", c.max_positions)):
            state[f"bert.embeddings.{name}_embeddings.weight"] = torch.randn(
                rows, c.hidden, generator=random, dtype=torch.float64
            )
        linear("cls.predictions.transform.dense", c.hidden, c.hidden)
        norm("cls.predictions.transform.LayerNorm")
        state["cls.predictions.bias"] = torch.randn(c.vocab, generator=random, dtype=torch.float64)
    return state


class Published:
    """The computation of the paper and its public code, block by block, with dense additive masks."""

    def __init__(self, state: State, config: QFormerConfig = CONFIG) -> None:
        self.p, self.c = state, config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.c.hidden,), self.p[f"{name}.weight"], self.p[f"{name}.bias"], 1e-12)

    def attend(self, name: str, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.self.{part}", s).unflatten(-1, (self.c.heads, -1)).transpose(1, 2)
            for part, s in (("query", x), ("key", source), ("value", source))
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + torch.where(seen, 0.0, -1e4).unsqueeze(1)
        o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", o))

    def feed_forward(self, at: str, suffix: str, x: Tensor) -> Tensor:
        h = F.gelu(self.linear(f"{at}.intermediate{suffix}.dense", x))
        return self.norm(f"{at}.output{suffix}.LayerNorm", x + self.linear(f"{at}.output{suffix}.dense", h))

    def __call__(self, image: Tensor, ids: Tensor, mask: Tensor, mode: str) -> Tensor:
        b, n = image.shape[0], self.c.num_query
        words, places = (self.p[f"bert.embeddings.{k}_embeddings.weight"] for k in ("word", "position"))
        x = torch.cat([self.p["query_tokens"].expand(b, -1, -1), words[ids] + places[: ids.shape[1]]], 1)
        x = self.norm("bert.embeddings.LayerNorm", x)
        seen, everything = self.visible(mask, mode), torch.ones(b, n, image.shape[1], dtype=torch.bool)
        for i in range(self.c.layers):
            at = f"bert.encoder.layer.{i}"
            x = self.attend(f"{at}.attention", x, x, seen)
            query, text = x[:, :n], x[:, n:]
            if i % self.c.cross_every == 0:
                query = self.attend(f"{at}.crossattention", query, image, everything)
            x = torch.cat([self.feed_forward(at, "_query", query), self.feed_forward(at, "", text)], 1)
        return x

    def visible(self, mask: Tensor, mode: str) -> Tensor:
        b, length = mask.shape
        n = self.c.num_query
        seen = torch.zeros(b, n + length, n + length, dtype=torch.bool)
        seen[:, :n, :n] = True
        if mode in ("itm", "instruct"):
            seen[:, :n, n:] = mask[:, None]
        seen[:, n:, :n] = mode != "itc"
        causal = torch.ones(length, length, dtype=torch.bool).tril() if mode == "itg" else True
        seen[:, n:, n:] = mask[:, None].expand(b, length, length) & causal
        return seen

    def logits(self, hidden: Tensor) -> Tensor:
        head = "cls.predictions"
        h = self.norm(f"{head}.transform.LayerNorm", F.gelu(self.linear(f"{head}.transform.dense", hidden)))
        return h @ self.p["bert.embeddings.word_embeddings.weight"].T + self.p[f"{head}.bias"]
