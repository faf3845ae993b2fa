"""One transformer block and one decoder for every language model of the library: the differences are fields of a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.attention import KVCache, Record, SelfAttention, Visibility, alibi_slopes, rotary_table
from mmkernels.layers.decoder_tables import LAYOUTS, decoder_table, layer_names
from mmkernels.layers.mlp import MLP
from mmkernels.layers.modality_adapter import AdapterConfig, ModalityAdapter, adapters_table
from mmkernels.layers.moe import ExpertsConfig, MoE
from mmkernels.layers.norm import make_norm
from mmkernels.primitives import _check


@dataclass(frozen=True)
class BlockConfig:
    """A pre-norm transformer block: `x += attention(norm(x)); x += mlp(norm(x))`, or both from one norm when `parallel`.

    With an `adapter` it stands before the attention. Training drops each of a sequence's two sums with probability `drop_path`.
    With `norm_after` the residual is outside of the norm: `x += norm(attention(x)); x += norm(mlp(x))`. With `experts` the mlp
    is a mixture of them.
    """

    width: int
    heads: int
    hidden: int
    kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "gelu"
    norm: str = "layer"
    norm_bias: bool = True
    eps: float = 1e-5
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: str | None = None
    parallel: bool = False
    adapter: AdapterConfig | None = None
    drop_path: float = 0.0
    norm_after: bool = False
    experts: ExpertsConfig | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A causal language model around its blocks, as the published `family` (a name of `Decoder.sources`) builds it.

    `positions` is "alibi", "rotary" (over `rotary_fraction` of each head), "learned" or "none"; `window` limits how far back a
    row sees; `tied` makes the embedding the head too. `rotary_scaling` divides rotary positions; fresh embeddings have `std`.
    """

    family: str
    block: BlockConfig
    layers: int
    vocab: int
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    max_positions: int = 2048
    position_offset: int = 0
    window: int | None = None
    tied: bool = False
    head_bias: bool = False
    rotary_scaling: float = 1.0
    std: float = 0.02


class Block(nn.Module):
    """See `BlockConfig`."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.parallel and c.norm_after:
            raise ValueError("norm_after: got True beside parallel, expected at most one of them")
        self.attention_norm = make_norm(c.norm, c.width, eps=c.eps, bias=c.norm_bias)
        self.attention = SelfAttention(
            c.width, c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, qkv_bias=c.qkv_bias, out_bias=c.out_bias,
            qk_norm=c.qk_norm, norm=c.norm, norm_bias=c.norm_bias,
        )  # fmt: skip
        self.mlp_norm = None if c.parallel else make_norm(c.norm, c.width, eps=c.eps, bias=c.norm_bias)
        self.mlp = (
            MLP(c.width, c.hidden, c.activation, bias=c.mlp_bias)
            if c.experts is None
            else _experts(c, c.experts)
        )
        self.adapter = None if c.adapter is None else _adapter(c.width, c.adapter)

    def forward(self, x: Tensor, seen: Visibility, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x `[B, T, C]` -> the same shape; with a cache the T rows continue what `layer` has stored."""
        if self.config.norm_after and self.mlp_norm is not None:
            x = x + self._drop(self.attention_norm(self.attention(x, seen, cache, layer)), seen)
            return x + self._drop(self.mlp_norm(self._feed(x, seen)), seen)
        normed = self.attention_norm(x)
        adapted = normed
        if self.adapter is not None and self.config.adapter is not None:
            kept = None if cache is None else cache.kept
            adapted = self.adapter.adapt(normed, self.config.adapter.reads, seen.first, kept, layer)
        attended = self._drop(self.attention(adapted, seen, cache, layer), seen)
        if self.mlp_norm is None:
            return x + attended + self._drop(self._feed(normed, seen), seen)
        x = x + attended
        return x + self._drop(self._feed(self.mlp_norm(x), seen), seen)

    def _feed(self, x: Tensor, seen: Visibility) -> Tensor:
        """The feed-forward, or the experts, which say who went where."""
        if not isinstance(self.mlp, MoE):
            return self.mlp(x)
        y, routing = self.mlp.run(x)
        if seen.routings is not None:
            seen.routings.kept.append(routing)
        return y

    def _drop(self, x: Tensor, seen: Visibility) -> Tensor:
        """Stochastic depth, a sequence or packed slice at a time; what stays is scaled up."""
        p = self.config.drop_path
        if p == 0 or not self.training:
            return x
        if seen.packed is not None:
            kept = F.dropout(x.new_ones(seen.packed.offsets.shape[0], 1), p)
            return x * kept[seen.packed.slice]
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1), p)


def _experts(c: BlockConfig, e: ExpertsConfig) -> MoE:
    return MoE(
        c.width, c.hidden, e.experts, e.top_k, capacity_factor=e.capacity_factor, policy=e.policy,
        eval_capacity_factor=e.eval_capacity_factor, activation=c.activation, residual=e.residual, bias=c.mlp_bias,
        min_capacity=e.min_capacity, sampling=e.sampling,
    )  # fmt: skip


def _adapter(width: int, c: AdapterConfig) -> ModalityAdapter:
    _check.choice("reads", c.reads, ("first", "token", "first_image"))
    return ModalityAdapter(width, c.rank, c.groups, c.temperature, c.scale, c.router_dtype, c.routed)


class Decoder(nn.Module):
    """Token embedding, blocks, final norm and output head. The loop over blocks belongs to whoever places things between them.

    `special` are token ids whose embedding rows live apart, in `special_rows`, and can be trained while the table is frozen:
    the frozen table is then never touched by an optimizer, not even by its weight decay. With a tied head they answer for
    these tokens' logits too. Published weights load with the names of `sources`; Mistral, Yi, InternLM, StableLM and
    Qwen2 files are laid out as "llama". `make_block(layer)` makes other blocks than `config.block` describes.
    """

    sources = tuple(LAYOUTS)

    def __init__(
        self,
        config: DecoderConfig,
        special: tuple[int, ...] = (),
        make_block: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        c = self.config = config
        _check.choice("positions", c.positions, ("alibi", "rotary", "learned", "none"))
        self.special = special
        self.embedding = nn.Embedding(c.vocab, c.block.width)
        nn.init.normal_(self.embedding.weight, std=c.std)
        rows = torch.empty(len(special), c.block.width).normal_(std=c.std)
        self.special_rows = (
            nn.Parameter(rows) if special else None
        )  # an unused parameter would stop a distributed step
        if c.positions == "learned":
            self.position_embedding = nn.Embedding(c.max_positions + c.position_offset, c.block.width)
            nn.init.normal_(self.position_embedding.weight, std=c.std)
        make = make_block or (lambda layer: Block(c.block))
        self.blocks = nn.ModuleList(make(layer) for layer in range(c.layers))
        self.norm = make_norm(c.block.norm, c.block.width, eps=c.block.eps, bias=c.block.norm_bias)
        self.head = None if c.tied else nn.Linear(c.block.width, c.vocab, c.head_bias)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Room for the keys and values of `capacity` tokens."""
        b, weight = self.config.block, self.embedding.weight
        shape = (self.config.layers, batch, capacity, b.kv_heads or b.heads, b.head_dim or b.width // b.heads)
        return KVCache(shape, dtype=weight.dtype, device=weight.device)

    def embed(self, ids: Tensor) -> Tensor:
        """`[B, T]` ids -> `[B, T, C]`."""
        x = self.embedding(ids)
        rows = () if self.special_rows is None else self.special_rows
        for row, token in zip(rows, self.special, strict=True):
            x = torch.where((ids == token).unsqueeze(-1), row, x)
        return x

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.config.positions != "learned":
            return x
        return x + self.position_embedding(positions + self.config.position_offset)

    def positions(self, mask: Tensor | None, shape: tuple[int, int], cache: KVCache | None) -> Tensor:
        """int32 `[B, T]`: tokens count from the first one that is not padding; padding before it counts as 0."""
        start, offset = _start(mask, cache), 0 if cache is None else cache.length
        device = self.embedding.weight.device
        t = torch.arange(offset, offset + shape[1], dtype=torch.int32, device=device).expand(shape)
        return t if start is None else (t - start.unsqueeze(1)).clamp(min=0)

    def visibility(self, mask: Tensor | None, positions: Tensor, cache: KVCache | None) -> Visibility:
        """Causal intervals: a row sees `[first token, itself]`, within the window; padding on the left sees nothing.

        Padding on the right needs no rule: no token comes after it.
        """
        c, offset = self.config, 0 if cache is None else cache.length
        start, (b, t) = _start(mask, cache), positions.shape
        index = torch.arange(offset, offset + t, dtype=torch.int32, device=positions.device).expand(b, t)
        lo = torch.zeros_like(index) if start is None else start.unsqueeze(1).expand(b, t)
        if c.window is not None:
            lo = torch.maximum(lo, index + 1 - c.window)
        hi = torch.maximum(index + 1, lo)
        rotary = slopes = None
        if c.positions == "rotary":
            width = int((c.block.head_dim or c.block.width // c.block.heads) * c.rotary_fraction)
            dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            rotary = rotary_table(positions, width, c.rotary_base, dtype, c.rotary_scaling)
        if c.positions == "alibi":
            slopes = alibi_slopes(c.block.heads, positions.device)
        return Visibility(lo, hi, rotary, slopes, routings=Record())

    def logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.head is not None:
            return self.head(x)
        logits = F.linear(x, self.embedding.weight)
        if self.special_rows is None:
            return logits
        index = torch.tensor(self.special, device=x.device)
        return logits.index_copy_(-1, index, F.linear(x, self.special_rows))

    def published(self, source: str) -> Table:
        """Where the authors' files keep the model's parameters."""
        c = self.config
        table = decoder_table(
            source,
            heads=c.block.heads,
            kv_heads=c.block.kv_heads,
            vocab=c.vocab,
            special=self.special,
            tied=c.tied,
        )
        for layer, block in enumerate(self.blocks):
            if isinstance(block, Block) and isinstance(block.mlp, MoE):
                table += block.mlp.within(layer_names(source, layer)).under(f"blocks.{layer}.mlp.", "")
        return table + adapters_table(self.blocks, source, "layers") if source == "lavin" else table


def _start(mask: Tensor | None, cache: KVCache | None) -> Tensor | None:
    """int32 `[B]` padding tokens before each row's first token; a cache that has begun remembers its own."""
    if cache is not None and cache.length > 0:
        return cache.start
    return None if mask is None else mask.to(torch.int8).argmax(1).int()
