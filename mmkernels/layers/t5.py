"""T5 v1.1, the encoder-decoder language model behind FlanT5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.attention import KVCache
from mmkernels.layers.biased_attention import biased_attention, relative_buckets
from mmkernels.layers.mlp import MLP
from mmkernels.layers.norm import make_norm
from mmkernels.layers.t5_tables import SOURCES, t5_table
from mmkernels.primitives import _check

_MLP = {"gelu": "geglu", "gelu_tanh": "geglu_tanh"}


@dataclass(frozen=True)
class T5Config:
    """Sizes of both stacks. BLIP-2 and InstructBLIP run FlanT5 with the exact "gelu"; T5 itself with "gelu_tanh".

    With `tied`, the embedding is the head too, and the last states are scaled by `width^-1/2` before it.
    """

    width: int
    head_dim: int
    heads: int
    hidden: int
    layers: int
    decoder_layers: int
    vocab: int
    buckets: int = 32
    max_distance: int = 128
    activation: str = "gelu"
    eps: float = 1e-6
    tied: bool = False


class T5Cache:
    """What a decoded sequence keeps: its own keys and values, and those of the encoder's states, which stay as they are."""

    def __init__(self, text: KVCache, heads: int) -> None:
        self.text, self.heads = text, heads
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.mask: Tensor | None = None

    @property
    def length(self) -> int:
        """How many tokens have been decoded."""
        return self.text.length

    def select(self, rows: Tensor) -> T5Cache:
        """A cache of the sequences `rows` `[N]`; see `KVCache.select`."""
        each = (rows.unsqueeze(1) * self.heads + torch.arange(self.heads, device=rows.device)).flatten()
        found = T5Cache(self.text.select(each), self.heads)
        found.cross = [(k[each], v[each]) for k, v in self.cross]
        found.mask = None if self.mask is None else self.mask[rows]
        return found


class T5Block(nn.Module):
    """Pre-norm self-attention, in the decoder cross-attention, and a gated feed-forward; no biases."""

    def __init__(self, config: T5Config, crosses: bool) -> None:
        super().__init__()
        c, inner = config, config.heads * config.head_dim
        self.heads = c.heads
        self.attention_norm = make_norm("rms", c.width, eps=c.eps)
        self.qkv, self.out = nn.Linear(c.width, 3 * inner, False), nn.Linear(inner, c.width, False)
        if crosses:
            self.cross_norm = make_norm("rms", c.width, eps=c.eps)
            self.cross_q, self.cross_kv = (nn.Linear(c.width, n * inner, False) for n in (1, 2))
            self.cross_out = nn.Linear(inner, c.width, False)
        self.mlp_norm = make_norm("rms", c.width, eps=c.eps)
        self.mlp = MLP(c.width, c.hidden, _MLP[c.activation], bias=False)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        *,
        crossed: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x `[B, T, C]`; `mask` is over the keys: x itself in the encoder, the encoder's states in the decoder."""
        q, k, v = self._split(self.qkv(self.attention_norm(x)))
        if cache is not None:
            k, v = (t.squeeze(2) for t in cache.append(layer, k.unsqueeze(2), v.unsqueeze(2)))
        own = mask if crossed is None else None
        x = x + self.out(self._join(biased_attention(q, k, v, self.heads, bias=bias, mask=own)))
        if crossed is not None:
            (q,) = self._split(self.cross_q(self.cross_norm(x)))
            x = x + self.cross_out(self._join(biased_attention(q, *crossed, self.heads, mask=mask)))
        return x + self.mlp(self.mlp_norm(x))

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B H, S, D]` of the encoder's states `[B, S, C]`."""
        k, v = self._split(self.cross_kv(states))
        return k, v

    def _split(self, joined: Tensor) -> tuple[Tensor, ...]:
        """`[B, T, n H D]` -> n times `[B H, T, D]`, where products can read every head."""
        parts = joined.shape[-1] // self.out.in_features
        return joined.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()

    def _join(self, o: Tensor) -> Tensor:
        return o.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)


class T5Stack(nn.Module):
    """Blocks that share one table of position biases, and the norm after them."""

    def __init__(self, config: T5Config, layers: int, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.relative_bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(T5Block(config, crosses=causal) for _ in range(layers))
        self.norm = make_norm("rms", config.width, eps=config.eps)

    def bias(self, queries: int, keys: int) -> Tensor:
        """`[H, queries + keys - 1]` by distance, smallest first; the queries are the last of the keys. Once for all blocks."""
        weight = self.relative_bias.weight
        distance = torch.arange(1 - keys, queries, device=weight.device)
        buckets = relative_buckets(
            distance, self.config.buckets, self.config.max_distance, both_ways=not self.causal
        )
        by_distance = weight.to(torch.promote_types(weight.dtype, torch.float32))[buckets].t()
        return by_distance.masked_fill(distance > 0, -torch.inf) if self.causal else by_distance


class T5(nn.Module):
    """An encoder that takes embeddings, a causal decoder that looks at its states, and one embedding for both.

    `softmax(q k^T + b(j - i)) v` without `1 / sqrt(D)`; b is a learned table over 32 buckets of distances.

    **Source** T5 (arXiv 1910.10683), its version 1.1; FlanT5 (arXiv 2210.11416). Weights of `huggingface` load by
    `weights.load`. Computes no dropout.
    """

    sources = SOURCES

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        c = self.config = config
        _check.choice("activation", c.activation, _MLP)
        _check.positive(
            width=c.width, head_dim=c.head_dim, heads=c.heads, layers=c.layers, decoder_layers=c.decoder_layers
        )  # fmt: skip
        self.embedding = nn.Embedding(c.vocab, c.width)
        self.encoder = T5Stack(c, c.layers, causal=False)
        self.decoder = T5Stack(c, c.decoder_layers, causal=True)
        self.head = None if c.tied else nn.Linear(c.width, c.vocab, False)
        self._initialize()

    def _initialize(self) -> None:
        """The published rule: matrices from N(0, 1 / inputs), queries smaller by the missing `sqrt(D)`, embedding N(0, 1)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if name.endswith(("qkv", "cross_q")):
                    with torch.no_grad():
                        module.weight[: self.config.heads * self.config.head_dim] *= (
                            self.config.head_dim**-0.5
                        )
        for stack in (self.encoder, self.decoder):
            nn.init.normal_(stack.relative_bias.weight, std=self.config.width**-0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """`[B, T]` ids -> `[B, T, C]`, for either side."""
        return self.embedding(ids)

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the decoder looks at: states `[B, S, C]` of embeddings `[B, S, C]`, text or any other tokens.

        attention_mask bool `[B, S]`, True at what counts, anywhere. **Gradient** the embeddings and every parameter.
        **Edge** padding may hold anything, NaN included: it is replaced by zeros, and its states mean nothing.
        **Raises** ValueError for shapes, TypeError for dtypes.
        """
        _check.shapes(
            inputs_embeds=(inputs_embeds, f"B S {self.config.width}"), attention_mask=(attention_mask, "B S")
        )
        _check.dtypes((torch.bool,), attention_mask=attention_mask)
        x, length = _without_padding(inputs_embeds, attention_mask), inputs_embeds.shape[1]
        bias = self.encoder.bias(length, length)
        for block in self.encoder.blocks:
            x = block(x, bias, attention_mask)
        return self.encoder.norm(x)

    def decode(
        self,
        decoder_input_ids: Tensor,
        states: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        """Next-token logits `[B, T, vocab]` of the tokens `[B, T]`, which begin with the start token (FlanT5's is 0).

        states `[B, S, C]` and attention_mask bool `[B, S]` as in `encode`. With a cache from `new_cache` the tokens go on where
        it ends, and it grows in place; from the second call on it knows the states and their mask, and both are None.
        **Gradient** the states and every parameter; with a cache none. **Edge** padding of the tokens belongs on the right,
        where no token looks; a row whose states are all masked looks at nothing: exactly zero cross-attention.
        **Raises** ValueError for shapes, ids out of range (on CPU), states missing or given twice; TypeError for dtypes.
        """
        self._check(decoder_input_ids, states, attention_mask, cache)
        crossed, mask = self._crossed(states, attention_mask, cache)
        text, length = None if cache is None else cache.text, decoder_input_ids.shape[1]
        x = self.embed(decoder_input_ids)
        bias = self.decoder.bias(length, length + (0 if text is None else text.length))
        for index, block in enumerate(self.decoder.blocks):
            x = block(x, bias, mask, crossed=crossed[index], cache=text, layer=index)
        if text is not None:
            text.length += length
        x = self.decoder.norm(x)
        return (
            F.linear(x * self.config.width**-0.5, self.embedding.weight)
            if self.head is None
            else self.head(x)
        )

    def new_cache(self, batch: int, capacity: int) -> T5Cache:
        """Room for `capacity` decoded tokens; every head is a row of its own, so that products read the buffers in place."""
        c, weight = self.config, self.embedding.weight
        shape = (c.decoder_layers, batch * c.heads, capacity, 1, c.head_dim)
        return T5Cache(KVCache(shape, dtype=weight.dtype, device=weight.device), c.heads)

    def _crossed(
        self, states: Tensor | None, mask: Tensor | None, cache: T5Cache | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Every decoder block's keys and values of the states, and their mask: from the cache once it has begun."""
        if states is None:
            assert cache is not None  # checked
            return cache.cross, cache.mask
        states = _without_padding(states, mask)
        crossed = [block.keys(states) for block in self.decoder.blocks]  # type: ignore[operator]
        if cache is not None:
            cache.cross, cache.mask = crossed, mask
        return crossed, mask

    def _check(self, ids: Tensor, states: Tensor | None, mask: Tensor | None, cache: T5Cache | None) -> None:
        c, begun = self.config, cache is not None and bool(cache.cross)
        _check.shapes(
            decoder_input_ids=(ids, "B T"), states=(states, f"B S {c.width}"), attention_mask=(mask, "B S")
        )
        _check.dtypes((torch.int64, torch.int32), decoder_input_ids=ids)
        _check.dtypes((torch.bool,), attention_mask=mask)
        if begun != (states is None) or (begun and mask is not None):
            came, expected = ("None", "the encoder's [B, S, C]") if states is None else ("a tensor", "None")
            raise ValueError(
                f"states: got {came}, expected {expected}: they and their mask are given once, with the first tokens"
            )
        if cache is not None and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("cache: got one while gradients are recorded, expected torch.no_grad()")
        if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        if not 0 <= int(ids.min()) <= int(ids.max()) < c.vocab:
            raise ValueError(
                f"decoder_input_ids: got ids {int(ids.min())} to {int(ids.max())}, expected 0 to {c.vocab - 1}"
            )

    def published(self, source: str) -> Table:
        """Where the authors' files keep the model's parameters."""
        return t5_table(source, self.config.tied)


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros at padding: no bias anywhere, so its keys and values are finite in every layer."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
