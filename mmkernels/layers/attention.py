"""Self-attention over key intervals: causal text, padding, sliding windows and whole images are the same call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.layers.norm import make_norm
from mmkernels.ops.sliced_image import slice_attention
from mmkernels.primitives import _check
from mmkernels.primitives.interval_attention import interval_attention


class Packed(NamedTuple):
    """Slices behind one another in one row: their offsets int32 `[S + 1]`, and the slice of each token `[T]`."""

    offsets: Tensor
    slice: Tensor


class Record:
    """What layers leave for whoever runs them. An object of its own: wrappers of modules copy the lists that they are given."""

    def __init__(self) -> None:
        self.kept: list[Any] = []


class Visibility(NamedTuple):
    """What all layers of a stack share: which keys a row sees, and how positions enter.

    lo, hi int32 `[B, T]`; rotary `(cos, sin)`, each `[B, T, 1, R / 2]`, turns the first R of every head; slopes `[H]` is ALiBi.
    `first [B]` is where a row's first token stands, for adapters that read it; None: at 0. With `packed` there is one row,
    whose tokens see their own slice, whatever lo and hi say. Layers with experts leave their `Routing` in
    `routings`.
    """

    lo: Tensor
    hi: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    alibi_slopes: Tensor | None = None
    first: Tensor | None = None
    packed: Packed | None = None
    routings: Record | None = None


class KVCache:
    """Keys and values of every layer in two buffers that never move: `[layers, B, capacity, G, D]`.

    `length` tokens are filled; `start` `[B]` counts the padding before each row's first token. `kept` is what a layer's
    adapter decided when its rows began.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.start = torch.zeros(shape[1], dtype=torch.int32, device=device)
        self.length = 0
        self.kept: dict[int, Tensor] = {}

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens `[B, T, G, D]` of one layer and returns views of all its tokens so far."""
        end = self.length + k.shape[1]
        if k.shape[0] != self.k.shape[1] or end > self.capacity:
            raise ValueError(
                f"cache: got {k.shape[0]} rows of {end} tokens, expected {self.k.shape[1]} rows of at most {self.capacity}"
            )
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the sequences `rows` `[N]`, some perhaps several times, some not at all."""
        layers, _, *rest = self.k.shape
        found = KVCache((layers, len(rows), *rest), dtype=self.k.dtype, device=self.k.device)  # type: ignore[arg-type]
        for mine, theirs in ((self.k, found.k), (self.v, found.v)):
            theirs[:, :, : self.length] = mine[:, rows, : self.length]
        found.start, found.length = self.start[rows], self.length
        found.kept = {layer: decided[rows] for layer, decided in self.kept.items()}
        return found


def rotary_table(
    positions: Tensor, width: int, base: float, dtype: torch.dtype, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of `position / scaling * base^(-2 r / width)`: positions `[B, T]` -> two `[B, T, 1, width / 2]`.

    All of it in `dtype`: positions, frequencies, their product and the result are rounded to it, as models that were built in
    bfloat16 do (there 256 and 257 are one position). `scaling` above 1 fits longer texts between the positions trained.
    """
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, width, 2, dtype=wide, device=positions.device)
    frequencies = (1.0 / base ** (steps / width)).to(dtype)
    angles = (positions.to(dtype) / scaling)[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (r, r + R/2) of the first R channels of each head by the row's angles; x `[B, T, H, D]`."""
    cos, sin = table
    half = cos.shape[-1]
    a, b, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """One slope per head, `2^(-8 n / N)` for n = 1 .. N; for other counts than powers of two, every second one first."""
    size = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** (-8.0 / size * torch.arange(1, size + 1, dtype=torch.float32, device=device))
    return slopes if size == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


class SelfAttention(nn.Module):
    """Grouped-query self-attention with one product for queries, keys and values (rows of `qkv`: all q, all k, all v)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: str | None = None,
        norm: str = "layer",
        norm_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or width // heads
        _check.choice("qk_norm", qk_norm, (None, "full", "head"))
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * self.head_dim, qkv_bias)
        self.out = nn.Linear(heads * self.head_dim, width, out_bias)
        self.qk_norm = qk_norm
        if qk_norm is not None:
            widths = [
                n * self.head_dim if qk_norm == "full" else self.head_dim for n in (heads, self.kv_heads)
            ]
            self.q_norm, self.k_norm = (make_norm(norm, w, bias=norm_bias) for w in widths)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, T, H, D]`, k and v `[B, T, G, D]`, normalised if asked: over the full width, or head by head."""
        kv = self.kv_heads * self.head_dim
        q, k, v = self.qkv(x).split((self.heads * self.head_dim, kv, kv), dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x: Tensor, seen: Visibility, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        q, k, v = self._project(x)
        if seen.rotary is not None:
            q, k = rotate(q, seen.rotary), rotate(k, seen.rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if seen.packed is not None:
            o = slice_attention(q.squeeze(0), k.squeeze(0), v.squeeze(0), seen.packed.offsets)
            return self.out(o.flatten(1).unsqueeze(0))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = interval_attention(q, k, v, seen.lo, seen.hi, alibi_slopes=seen.alibi_slopes)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
