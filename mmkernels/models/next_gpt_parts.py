"""What stands on either side of NExT-GPT's language model: encoders of three kinds, and small makers of what they read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers.cross_attention import CrossBlock, everything
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.primitives import _check


class Encoder(nn.Module):
    """A tower's class token as one vector of length 1, the mean over clips: `mean normalise(W LN(class))`."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.tower = VisionTower(replace(config, keep_class=True))
        self.norm = nn.LayerNorm(config.width, 1e-6)
        self.head = nn.Linear(config.width, width, bias=False)

    def forward(self, clips: Tensor) -> Tensor:
        """clips `[N, F, 3, S, S]`, pictures being one clip and sounds their spectrogram -> `[N, width]`."""
        size = _check.shapes(clips=(clips, "N F 3 H W"))
        classes = self.tower(clips.flatten(0, 1))[:, 0]
        return F.normalize(self.head(self.norm(classes)), dim=-1).unflatten(0, (size["N"], size["F"])).mean(1)


def spectrogram(wave: Tensor, side: int) -> Tensor:
    """A sound as a square picture: log magnitudes of `side` frequencies at `side` times, three times the same.

    **Shapes** wave `[N, L]`, L >= 2 side -> `[N, 3, side, side]`. **Raises** ValueError for shapes and shorter waves.
    """
    size = _check.shapes(wave=(wave, "N L"))
    if size["L"] < 2 * side:
        raise ValueError(f"wave: got {size['L']} samples, expected {2 * side} or more for {side} frequencies")
    wide = wave.to(torch.promote_types(wave.dtype, torch.float32))
    window = torch.hann_window(2 * side, dtype=wide.dtype, device=wave.device)
    hop = size["L"] // side
    wide = F.pad(wide, (side, side))
    found = torch.stft(wide, 2 * side, hop, window=window, center=False, return_complex=True)
    logs = (found.abs()[:, 1:, :side] + 1e-2).log()
    return (logs * 0.5).unsqueeze(1).expand(-1, 3, -1, -1).to(wave.dtype)


@dataclass(frozen=True)
class MakerConfig:
    """What makes a modality out of a text's states: `shape` of a sample, cut into `patch`es, by `layers` blocks of `width`.

    A picture or frame `[..., 3, S, S]` is cut into squares of side `patch`, a sound `[L]` into runs of `patch` samples.
    """

    shape: tuple[int, ...]
    patch: int
    width: int = 128
    layers: int = 3
    heads: int = 4
    text_layers: int = 1


class Maker(nn.Module):
    """A text encoder, and a decoder that turns noise into a sample behind the text's states, as diffusion pipelines do.

    The decoder sees `x_t = (1 - t) noise + t x` and predicts x (rectified flow, arXiv 2209.03003); `make` walks from noise
    to a sample in a few steps. Conditions are `queries` states of `width`, what NExT-GPT's output projection is aligned with.
    """

    def __init__(self, config: MakerConfig, vocab: int, queries: int, width: int, longest: int = 16) -> None:
        super().__init__()
        c = self.config = config
        self.queries, self.longest = queries, longest
        block = BlockConfig(width, 4, 2 * width)
        self.words = nn.Embedding(vocab, width)
        self.places = nn.Parameter(torch.randn(longest, width) * 0.1)
        self.text = nn.ModuleList(Block(block) for _ in range(c.text_layers))
        self.text_norm = nn.LayerNorm(width)
        tokens, size = self._cut(torch.zeros(1, *c.shape)).shape[1:]
        self.positions = nn.Parameter(torch.randn(tokens, c.width) * 0.1)
        self.input, self.time = nn.Linear(size, c.width), nn.Linear(32, c.width)
        self.memory = nn.Linear(width, c.width)
        self.blocks = nn.ModuleList(
            CrossBlock(c.width, c.heads, 2 * c.width, "gelu") for _ in range(c.layers)
        )
        self.norm, self.output = nn.LayerNorm(c.width), nn.Linear(c.width, size)

    def conditions(self, ids: Tensor) -> Tensor:
        """Ids of texts `[B, L]`, padded to at most `longest` -> their states `[B, queries, width]`; one query is their mean.

        **Raises** ValueError for longer texts.
        """
        size = _check.shapes(ids=(ids, "B L"))
        if size["L"] > self.longest:
            raise ValueError(f"ids: got texts of {size['L']} tokens, expected at most {self.longest}")
        ids = F.pad(ids, (0, self.longest - size["L"]))
        x = self.words(ids) + self.places
        for block in self.text:
            x = block(x, everything(x, self.longest))
        x = self.text_norm(x)
        return x.mean(1, keepdim=True) if self.queries == 1 else x[:, : self.queries]

    def loss(self, conditions: Tensor, x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error of the predicted sample: x and noise `[B, *shape]`, time `[B]` in [0, 1)."""
        clean = self._cut(x)
        t = time[:, None, None].to(clean.dtype)
        return F.mse_loss(
            self._predict((1 - t) * self._cut(noise) + t * clean, time, conditions).float(), clean.float()
        )

    @torch.no_grad()
    def make(self, conditions: Tensor, *, steps: int = 8, generator: torch.Generator | None = None) -> Tensor:
        """conditions `[B, queries, width]` -> samples `[B, *shape]`. **Raises** ValueError for shapes and below one step."""
        _check.positive(steps=steps)
        size = _check.shapes(conditions=(conditions, f"B {self.queries} {self.words.embedding_dim}"))
        shape = (size["B"], *self.config.shape)
        x = self._cut(
            torch.randn(shape, generator=generator, device=conditions.device, dtype=conditions.dtype)
        )
        for n in range(steps):
            time = conditions.new_full((len(x),), n / steps)
            x = x + (self._predict(x, time, conditions) - x) / (steps - n)
        return self._join(x)

    def _predict(self, x: Tensor, time: Tensor, conditions: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(16, device=x.device) * (math.log(100.0) / 15))
        angles = time[:, None].float() * rates
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)).unsqueeze(1)
        y, memory = self.input(x) + self.positions + told, self.memory(conditions)
        for block in self.blocks:
            y = block(y, memory)
        return self.output(self.norm(y))

    def _cut(self, x: Tensor) -> Tensor:
        """`[B, *shape]` -> tokens `[B, N, size]`."""
        p = self.config.patch
        if x.dim() == 2:
            return x.unflatten(1, (-1, p))
        x = x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # [..., c, h, p, w, q]
        n = x.dim()
        order = (*range(n - 5), n - 4, n - 2, n - 5, n - 3, n - 1)  # [..., h, w, c, p, q]
        return x.permute(order).flatten(-3).flatten(1, -2)

    def _join(self, x: Tensor) -> Tensor:
        """The samples whose tokens these are."""
        p, shape = self.config.patch, self.config.shape
        if len(shape) == 1:
            return x.flatten(1)
        cells = (shape[-2] // p, shape[-1] // p)
        x = x.unflatten(1, (*shape[:-3], *cells)).unflatten(-1, (shape[-3], p, p))
        n = x.dim()
        order = (*range(n - 5), n - 3, n - 5, n - 2, n - 4, n - 1)
        return x.permute(order).reshape(len(x), *shape)
