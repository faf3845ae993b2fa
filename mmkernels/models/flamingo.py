"""Flamingo: a frozen vision tower and a frozen language model, joined by a resampler and gated cross-attention.

Systems: Flamingo and OpenFlamingo, MIMIC-IT/Otter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.decoder_tables import LAYOUTS, embedding_rules
from mmkernels.layers.gated_cross_attention import GatedCrossAttentionBlock, KeysValues, project_media_all
from mmkernels.layers.resampler import PerceiverResampler
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import IGNORE, Cache, MultimodalModel, Tokens
from mmkernels.models.packing import PackedPrompts
from mmkernels.models.stages import Stage
from mmkernels.ops.gated_cross_attention import Intervals
from mmkernels.primitives import _check


@dataclass(frozen=True)
class ResamplerConfig:
    """Arguments of `PerceiverResampler`; its width is the vision tower's."""

    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    latents: int = 64
    ff_mult: float = 4
    max_frames: int | None = None
    max_media: int | None = None
    ffn: str = "gelu"
    qk_norm: bool = False


@dataclass(frozen=True)
class CrossConfig:
    """Arguments of `GatedCrossAttentionBlock`, and where the blocks stand.

    `placement` (layers count from 0): "open_flamingo" before layers i with (i + 1) % every == 0, "idefics" before layers with
    i % every == 0, "after" after those.
    """

    every: int
    placement: str = "open_flamingo"
    heads: int = 8
    head_dim: int = 64
    ff_mult: float = 4
    media_mode: str = "last"
    no_media: str = "published"
    attend_previous: bool = True
    norm: str = "layer"
    ffn: str = "gelu"
    gate: str = "scalar"
    qk_norm: bool = False

    def layers(self, count: int) -> tuple[int, ...]:
        """The decoder layers that a block stands at."""
        shift = 1 if self.placement == "open_flamingo" else 0
        return tuple(i for i in range(count) if (i + shift) % self.every == 0)


@dataclass(frozen=True)
class FlamingoConfig:
    """A whole Flamingo. `stages` are its training recipe; the last one says what a freshly built model trains."""

    vision: VisionConfig
    lm: DecoderConfig
    cross: CrossConfig
    tokens: Tokens
    stages: tuple[Stage, ...]
    resampler: ResamplerConfig = ResamplerConfig()


class Condition(NamedTuple):
    """What the cross-attention blocks of one pass read: media `[B, I, L, Cv]`, each block's keys and values, what rows see.

    `count` `[B]` is how many media tokens each row has had: while a sequence continues, its last medium goes by it.
    """

    media: Tensor
    keys_values: list[KeysValues]
    intervals: Intervals
    count: Tensor

    def select(self, rows: Tensor) -> Condition:
        """The sequences `rows`, as a cache needs them: what their next tokens see is computed anew."""
        b = self.media.shape[0]
        keys_values = [
            tuple(t.unflatten(0, (b, -1))[rows].flatten(0, 1) for t in pair) for pair in self.keys_values
        ]
        return self._replace(media=self.media[rows], keys_values=keys_values, count=self.count[rows])


class Flamingo(MultimodalModel):
    """See `FlamingoConfig`. Text sees media through `media_time`: a media token opens the medium that follows it."""

    sources = ("open_flamingo",)

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        _check.choice("placement", config.cross.placement, ("open_flamingo", "idefics", "after"))
        self.config, self.tokens = config, config.tokens
        width, c, r = config.lm.block.width, config.cross, config.resampler
        self.vision = VisionTower(config.vision)
        self.resampler = PerceiverResampler(
            config.vision.width, depth=r.depth, heads=r.heads, head_dim=r.head_dim, latents=r.latents, ff_mult=r.ff_mult,
            max_frames=r.max_frames, max_media=r.max_media, ffn=r.ffn, qk_norm=r.qk_norm,
        )  # fmt: skip
        self.lm = Decoder(config.lm, special=(config.tokens.end_of_chunk, config.tokens.image))
        self.places = {layer: n for n, layer in enumerate(c.layers(config.lm.layers))}
        if not self.places:
            raise ValueError(
                f"every: got {c.every}, expected a number that places a block among {config.lm.layers} layers"
            )
        self.cross = nn.ModuleList(
            GatedCrossAttentionBlock(
                width, config.vision.width, heads=c.heads, head_dim=c.head_dim, ff_mult=c.ff_mult,
                media_mode=c.media_mode, no_media=c.no_media, attend_previous=c.attend_previous, norm=c.norm, ffn=c.ffn,
                gate=c.gate, qk_norm=c.qk_norm,
            )
            for _ in self.places
        )  # fmt: skip
        config.stages[-1].freeze(self)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def encode(self, images: Tensor) -> Tensor:
        """images `[B, I, F, 3, H, W]` or `[B, I, 3, H, W]` -> latents `[B, I, L, Cv]`; a frozen tower records no gradient."""
        if images.dim() == 5:
            images = images.unsqueeze(2)
        size = _check.shapes(images=(images, "B I F 3 H W"))
        patches = self.vision(images.flatten(0, 2)).unflatten(0, (size["B"], size["I"], size["F"]))
        return self.resampler(patches.to(self.resampler.latents.dtype))  # a frozen tower may be narrow

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> Condition:
        """Intervals by the media-time rules and the keys and values of all blocks; from the cache where it has them.

        While a cached sequence continues and no row of the call has a media token, every row sees the last medium it has seen.
        If any row has one, the call's own tokens count from 1 again, for the whole batch. So they do when media come in anew.
        """
        locations = input_ids == self.tokens.image
        count = locations.sum(1)
        kept: Condition | None = None if cache is None or media is not None else cache.media.get("condition")
        if kept is None:
            media = self._no_media(input_ids.shape[0]) if media is None else media
            keys_values = project_media_all(list(self.cross), media)  # type: ignore[arg-type]
            intervals = self._intervals(media, locations, input_ids.shape[1])
        else:
            media, keys_values = kept.media, kept.keys_values
            restart = locations.any()  # stays on the device: both answers are cheap
            own = self._intervals(media, locations, input_ids.shape[1])
            seen = torch.arange(media.shape[1] + 1, device=count.device) < kept.count.unsqueeze(1)
            last = self._intervals(media, seen, input_ids.shape[1], use_cached_media=True)
            intervals = Intervals(*(torch.where(restart, a, b) for a, b in zip(own, last, strict=True)))
            count = torch.where(restart, count, kept.count)
        condition = Condition(media, keys_values, intervals, count)
        if cache is not None:
            cache.media["condition"] = condition
        return condition

    def _no_media(self, batch: int) -> Tensor:
        latents = self.resampler.latents
        return latents.new_empty((batch, 0, *latents.shape))

    def _intervals(
        self, media: Tensor, locations: Tensor, rows: int, *, use_cached_media: bool = False
    ) -> Intervals:
        """What all blocks share: they differ in weights only."""
        block: Any = self.cross[0]
        return block.intervals(media, locations, rows, use_cached_media=use_cached_media)

    def pack(self, condition: Condition, packed: PackedPrompts) -> Condition:
        seen = Intervals(*(t[packed.index] for t in condition.intervals))
        return condition._replace(media=condition.media.flatten(0, 1).unsqueeze(0), intervals=seen)

    def before_block(self, index: int, x: Tensor, condition: Condition) -> Tensor:
        return x if self.config.cross.placement == "after" else self._cross(index, x, condition)

    def after_block(self, index: int, x: Tensor, condition: Condition) -> Tensor:
        return self._cross(index, x, condition) if self.config.cross.placement == "after" else x

    def _cross(self, index: int, x: Tensor, condition: Condition) -> Tensor:
        n = self.places.get(index)
        if n is None:
            return x
        return self.cross[n](
            x, condition.media, intervals=condition.intervals, media_kv=condition.keys_values[n]
        )

    def published(self, source: str) -> Table:
        """The released file: resampler, gated blocks by decoder layer, embedding. What was frozen may be missing from it."""
        lm = self.config.lm
        layout = LAYOUTS[lm.family]
        embedding = embedding_rules(f"{layout.embedding}.weight", lm.vocab, self.lm.special)
        table = self.resampler.published(source).under("resampler.", "perceiver.")
        table += Table(embedding).under("lm.", "lang_encoder.")
        for layer, n in self.places.items():
            block: Any = self.cross[n]
            path = f"lang_encoder.{layout.layers}.{layer}.gated_cross_attn_layer."
            table += block.published(source).under(f"cross.{n}.", path)
        frozen = (r"vision_encoder\..*", r"lang_encoder\.(?!.*\.gated_cross_attn_layer\.).*")
        return table + Table((), absent=(r"lm\..*", r"vision\..*"), ignored=frozen)

    def loss(self, batches: dict[str, dict[str, Tensor]], stage: Stage) -> Tensor:
        """The stage's weighted sum of the losses of a step's batches, each given as `forward`'s arguments by name."""
        unknown = sorted(set(batches) ^ set(stage.losses))
        if unknown:
            raise ValueError(f"batches: got {sorted(batches)}, expected {sorted(stage.losses)}")
        losses = [weight * self(**batches[name]).loss for name, weight in stage.losses.items()]
        return torch.stack(losses).sum()


def flamingo_labels(
    input_ids: Tensor, tokens: Tokens, attention_mask: Tensor | None = None, *, interleaved: bool = True
) -> Tensor:
    """Labels of a batch `[B, T]`: -100 on padding, on media tokens and, when `interleaved`, outside of chunks.

    A chunk runs from `<image>` to `<|endofchunk|>`, which is predicted. Without `interleaved` (pairs) the end of text is
    predicted too. **Source** the recipe of OpenFlamingo.
    """
    _check.shapes(input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"))
    media = input_ids == tokens.image
    keep = ~media & (input_ids != tokens.pad if attention_mask is None else attention_mask)
    if interleaved:
        position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
        opened = torch.where(media, position, 0).cummax(1).values
        closed = torch.where(input_ids == tokens.end_of_chunk, position, 0).cummax(1).values.roll(1, 1)
        closed[:, :1] = 0  # a chunk is closed after its last token
        keep = keep & (opened > closed)
    return torch.where(keep, input_ids, IGNORE)
