"""CogVLM's decoder layer: text and image tokens share norms, keys and values, and have weights of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.layers._published import Table
from mmkernels.layers.attention import KVCache, Visibility, rotary_table
from mmkernels.layers.expert_linear import Expert, ExpertLinear, Shared, check_tokens, route_tokens
from mmkernels.layers.norm import make_norm
from mmkernels.layers.visual_expert_tables import attention_table, block_table, mlp_table
from mmkernels.ops.visual_expert import causal_runs, expert_mlp, expert_qkv
from mmkernels.primitives import _autocast, _check
from mmkernels.primitives.interval_attention import interval_attention
from mmkernels.primitives.routing import Groups

Cache = KVCache | tuple[Tensor, Tensor]  # keys and values so far, each [B, tokens, G, D]


class VisualExpertAttention(Expert):
    """Causal grouped-query attention whose projections know the modality of a token; image patches are causal too.

    `q, k, v = rotate(qkv_m x)`, `y = out_m softmax(q k^T / sqrt(D)) v`, m the token's expert (`expert_mask`). Rows of a `qkv`
    are all q, all k, all v. `vision_bias` gives vision's qkv alone a bias (CogVLM2). Rotation is half-split over whole heads;
    `table_mode` "fp32" makes its table in float32, "model_dtype" in the parameters' dtype, as the published models do (in
    bfloat16, positions 256 and 257 then are one). `layer` is the module's number in a stack: its place in a `KVCache` and in
    files of the source "cogvlm_sat".

    **Source** CogVLM (arXiv 2311.03079) section 2.2; weights of `cogvlm`, `cogvlm2`, `cogvlm_sat` load by `weights.load`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        vision_bias: bool = False,
        rotary_base: float = 10_000.0,
        table_mode: str = "fp32",
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads = width, heads, kv_heads or heads
        _check.positive(width=width, heads=heads, kv_heads=self.kv_heads)
        if head_dim is None and width % heads:
            raise ValueError(
                f"heads: got {heads}, expected a divisor of width = {width} unless head_dim is given"
            )
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {kv_heads}, expected a divisor of heads = {heads}")
        self.head_dim = head_dim or width // heads
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim: got {self.head_dim}, expected an even number: channels turn in pairs"
            )
        _check.choice("table_mode", table_mode, ("fp32", "model_dtype"))
        self.rotary_base, self.table_mode, self.layer = rotary_base, table_mode, layer
        rows = (heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = ExpertLinear(width, rows, bias=(False, vision_bias))
        self.out = ExpertLinear(heads * self.head_dim, width)

    def share(
        self,
        x: Tensor,
        token_types: Tensor,
        positions: Tensor,
        *,
        key_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Shared:
        """What `forward` makes of its other arguments; the same for all layers of a pass, which take it as `shared`."""
        check_tokens(x, self.width, token_types, positions)
        lo, hi = self._intervals(x, key_mask, cache)
        return Shared(route_tokens(token_types), Visibility(lo, hi, self._rotary(positions)))

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The table in the dtype that q and k will have."""
        own = self.qkv.text.weight.dtype
        dtype = own if self.table_mode == "model_dtype" else torch.promote_types(own, torch.float32)
        cos, sin = rotary_table(positions, self.head_dim, self.rotary_base, dtype)
        if own != torch.float64:
            own = _autocast.dtype(positions.device.type) or own
        return cos.to(own), sin.to(own)

    def _intervals(self, x: Tensor, key_mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        b, rows, _ = x.shape
        past = 0 if cache is None else cache.length if isinstance(cache, KVCache) else cache[0].shape[1]
        if key_mask is not None:
            _check.shapes(key_mask=(key_mask, f"{b} {past + rows}"))
            _check.dtypes((torch.bool, torch.int64, torch.int32), key_mask=key_mask)
            return causal_runs(key_mask != 0, rows)
        at = torch.arange(past, past + rows, dtype=torch.int32, device=x.device).expand(b, rows)
        lo = torch.zeros_like(at)
        if isinstance(cache, KVCache) and cache.length:
            lo = cache.start.unsqueeze(1).expand(b, rows)
        return lo, torch.maximum(at + 1, lo)

    def forward(
        self,
        x: Tensor,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cache: Cache | None = None,
        return_cache: bool = False,
        shared: Shared | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Attends to the tokens before, and to what a cache keeps.

        **Shapes** x `[B, L, C]`; token_types `[B, L]`, 0 text and 1 vision; positions `[B, L]` (`image_positions`); key_mask
        `[B, keys]`, True or 1 at valid keys, those of the cache first; cache: keys and values so far, each `[B, n, G, D]`, or a
        `KVCache`, which is written in place and whose owner counts on. `shared` (see `share`) replaces token_types, positions
        and key_mask. Returns `[B, L, C]`, with `residual` added, and with `return_cache` the cache for the next tokens.
        **Dtypes** x as the parameters, or torch.autocast; token_types and positions int64 or int32, token_types also bool.
        **Gradient** x, every parameter, the cache's pair, residual. **Edge** a row that sees no valid key attends to nothing.
        **Raises** ValueError for shapes, and on CPU for token types beside 0 and 1 and for a key_mask with holes; TypeError.
        """
        shared = shared or self.share(x, *_given(token_types, positions), key_mask=key_mask, cache=cache)
        _check.shapes(x=(x, f"B L {self.width}"))
        (b, rows, _), d = x.shape, self.head_dim
        assert shared.seen.rotary is not None
        cos, sin = (t.reshape(b * rows, d // 2) for t in shared.seen.rotary)
        text, vision = self.qkv.text, self.qkv.vision
        q, k, v = expert_qkv(
            x.reshape(b * rows, self.width), shared.groups, text.weight, vision.weight, text.bias, vision.bias,
            rotary=(cos, sin), heads=self.heads, kv_heads=self.kv_heads,
        )  # fmt: skip
        q, k, v = (t.unflatten(0, (b, rows)) for t in (q, k, v))
        if isinstance(cache, KVCache):
            k, v = cache.append(self.layer, k, v)
        elif cache is not None:
            _check.shapes(k=(k, "B L G D"), cache_k=(cache[0], "B N G D"), cache_v=(cache[1], "B N G D"))
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        q, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
        o = interval_attention(q, k_, v_, shared.seen.lo, shared.seen.hi)
        o = o.transpose(1, 2).reshape(b * rows, self.heads * d)  # type: ignore[union-attr]
        flat = None if residual is None else residual.reshape(b * rows, self.width)
        y = self.out(o, shared.groups, flat).view(b, rows, self.width)
        if not return_cache:
            return y
        return y, cache if isinstance(cache, KVCache) else (k, v)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters."""
        return attention_table(source, self.layer)


def _given(token_types: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    for name, value in {"token_types": token_types, "positions": positions}.items():
        if value is None:
            raise ValueError(f"{name}: got None, expected [B, L] unless shared is given")
    return token_types, positions  # type: ignore[return-value]


class VisualExpertMLP(Expert):
    """`down_m(silu(gate_m x) * up_m x)`, m the token's expert (`expert_mask`); rows of an `up` are [gate; up].

    **Source** CogVLM (arXiv 2311.03079) section 2.2; weights of `cogvlm`, `cogvlm2`, `cogvlm_sat` load by `weights.load`.
    """

    def __init__(self, width: int, hidden: int, *, layer: int = 0) -> None:
        super().__init__()
        _check.positive(width=width, hidden=hidden)
        self.width, self.layer = width, layer
        self.up, self.down = ExpertLinear(width, 2 * hidden), ExpertLinear(hidden, width)

    def forward(
        self,
        x: Tensor,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        groups: Groups | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Every token through the feed-forward of its expert.

        **Shapes** x `[B, L, C]`; token_types `[B, L]`, 0 text and 1 vision, or `groups` (`Shared.groups`); positions are not
        looked at; returns `[B, L, C]`, with `residual` added.
        **Dtypes**, **Gradient**, **Raises** as `VisualExpertAttention`.
        """
        if groups is None:
            if token_types is None:
                raise ValueError("token_types: got None, expected [B, L] unless groups is given")
            check_tokens(x, self.width, token_types)
            groups = route_tokens(token_types)
        _check.shapes(x=(x, f"B L {self.width}"))
        flat = None if residual is None else residual.reshape(-1, self.width)
        up, down = ((e.text.weight, e.vision.weight) for e in (self.up, self.down))
        return expert_mlp(x.reshape(-1, self.width), groups, up, down, residual=flat).view(x.shape)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters."""
        return mlp_table(source, self.layer)


class VisualExpertBlock(Expert):
    """`x += attention(norm(x)); x += mlp(norm(x))`, norms RMS in float32 and shared by the modalities.

    Options as `VisualExpertAttention`. CogVLM: 4096 wide, 32 heads, hidden 11008; CogVLM2: hidden 14336, `kv_heads=8`,
    `vision_bias=True`, `rotary_base=5e5`, `eps=1e-5`.

    **Source** CogVLM (arXiv 2311.03079) section 2.2; weights of `cogvlm`, `cogvlm2`, `cogvlm_sat` load by `weights.load`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        vision_bias: bool = False,
        rotary_base: float = 10_000.0,
        table_mode: str = "fp32",
        eps: float = 1e-6,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = make_norm("rms", width, eps=eps)
        self.attention = VisualExpertAttention(
            width, heads, kv_heads=kv_heads, head_dim=head_dim, vision_bias=vision_bias, rotary_base=rotary_base,
            table_mode=table_mode, layer=layer,
        )  # fmt: skip
        self.mlp_norm = make_norm("rms", width, eps=eps)
        self.mlp = VisualExpertMLP(width, hidden, layer=layer)

    def forward(
        self,
        x: Tensor,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cache: Cache | None = None,
        return_cache: bool = False,
        shared: Shared | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        """See `VisualExpertAttention.forward`; a stack calls `attention.share` of its first block once and hands it to all."""
        attention = self.attention
        shared = shared or attention.share(x, *_given(token_types, positions), key_mask=key_mask, cache=cache)
        h, kept = attention(self.attention_norm(x), cache=cache, return_cache=True, shared=shared, residual=x)
        y = self.mlp(self.mlp_norm(h), groups=shared.groups, residual=h)
        return (y, kept) if return_cache else y

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters."""
        return block_table(source, self.layer)
