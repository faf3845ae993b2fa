"""SliME: the whole picture through a mixture of adapters, its tiles compressed, and of these what the text is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.mixture_adapter import MixtureAdapter
from mmkernels.layers.spatial_resampler import SpatialResampler
from mmkernels.layers.text_router import TextGuidedRouter
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import Cache, Output, Tokens
from mmkernels.models.places import Expanded
from mmkernels.models.spliced import TOWER, Spliced, place_runs
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check


@dataclass(frozen=True)
class Mode:
    """What a stage of SliME reads of a picture, and how: `expert` is `MixtureAdapter`'s, `top_p` the router's."""

    whole: bool = True
    local: bool = True
    expert: int | None = None
    top_p: float = 0.95


@dataclass(frozen=True)
class SlimeConfig:
    """A whole SliME: `grid^2` tokens of the whole picture (as many as the tower gives), `local_grid^2` of a tile.

    `separator` is the word between the two. `router` is a kind of `layers.TextGuidedRouter`. `stages` are the training recipe,
    and `modes` what each of them, by name, reads; without one it reads all. The last stage says what a freshly built model
    trains and reads.
    """

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    separator: int
    grid: int
    local_grid: int
    heads: int
    stages: tuple[Stage, ...]
    modes: Mapping[str, Mode]
    router: str = "cosine"
    temperature: float = 1.0

    @property
    def look(self) -> dict[str, Any]:
        """How pictures are cut: arguments of `data.looks.look`."""
        options = {
            "tile": self.vision.image_size, "patch": self.vision.patch_size, "tokens_per_view": self.local_grid**2,
        }  # fmt: skip
        return {"rule": "slime", "options": options}


class Tiles(NamedTuple):
    """views `[N, 3, S, S]`: of every picture the whole, then its tiles row by row; grids: every picture's (columns, rows)."""

    views: Tensor
    grids: Sequence[tuple[int, int]]


class Seen(NamedTuple):
    """whole `[I, grid^2, C]` and local, for each picture `[rows columns local_grid^2, C]`; None where a stage reads none."""

    whole: Tensor | None
    local: tuple[Tensor, ...] | None

    @property
    def pictures(self) -> int:
        return len(self.local or ()) if self.whole is None else len(self.whole)


def _looked(media: Any) -> bool:
    """Whether these are pictures that no text has been asked about yet."""
    return isinstance(media, Seen)


class Slime(Spliced):
    """See `SlimeConfig`. A text has one image token for a picture; how many tokens it becomes, the router decides from all
    other tokens of its row. `output.logits` are those of the longer text that `lay_out` makes.
    """

    sources = ("slime",)

    def __init__(self, config: SlimeConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokens, width = c.tokens, c.lm.block.width
        if c.vision.patches != c.grid**2:
            raise ValueError(
                f"grid: got {c.grid}, expected the side of the tower's {c.vision.patches} patches"
            )
        self.vision = VisionTower(c.vision)
        self.adapter = MixtureAdapter(c.vision.width, width, c.grid, c.heads)
        self.sampler = SpatialResampler(c.local_grid, c.vision.width, c.heads, release="slime")
        self.router = TextGuidedRouter(c.router, width, temperature=c.temperature)
        self.lm = Decoder(c.lm)
        self.enter(c.stages[-1])

    def enter(self, stage: Stage) -> None:
        """Trains what the stage trains, and reads pictures as it does."""
        super().enter(stage)
        self.mode = self.config.modes.get(stage.name, Mode())
        self.router.top_p = self.mode.top_p

    def sees(self) -> Sequence[nn.Module]:
        return self.vision, self.adapter, self.sampler

    def expand(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """One image token a picture is enough: the router makes places of it. **Raises** ValueError for videos."""
        if frames != 1:
            raise ValueError(f"frames: got {frames}, expected 1: Slime reads pictures")
        return input_ids, attention_mask

    def encode(self, images: Tiles) -> Seen:  # type: ignore[override]
        """**Raises** ValueError when views and grids differ in number, and for shapes."""
        starts, views = self._starts(images), images.views
        tiles = [columns * rows for columns, rows in images.grids]
        first = torch.tensor(starts, device=views.device, dtype=torch.int64)
        whole = local = None
        if self.mode.whole:
            whole = self.adapter(self._features(views[first]), self.mode.expert)
        if self.mode.local:
            rest = torch.ones(len(views), dtype=torch.bool, device=views.device).index_fill_(0, first, False)
            x = self._features(views[rest])
            hw = torch.full((len(x), 2), self.config.grid, dtype=torch.int64)
            read = self.adapter.projection(self.sampler(x, hw))
            local = tuple(
                self._merge(part, grid) for part, grid in zip(read.split(tiles), images.grids, strict=True)
            )
        return Seen(whole, local)

    def _starts(self, images: Tiles) -> list[int]:
        side = self.config.vision.image_size
        n = _check.shapes(images=(images.views, f"N 3 {side} {side}"))["N"]
        starts, at = [], 0
        for columns, rows in images.grids:
            _check.positive(columns=columns, rows=rows)
            starts.append(at)
            at += 1 + columns * rows
        if at != n:
            raise ValueError(
                f"images: got {n} views, expected {at}: of every picture the whole and its tiles"
            )
        return starts

    def _features(self, views: Tensor) -> Tensor:
        return self.vision(views).to(self.adapter.projection.input.weight.dtype)

    def _merge(self, tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tiles `[rows columns, g^2, C]` as rows of the whole map."""
        (columns, rows), g = grid, self.config.local_grid
        cells = tiles.unflatten(1, (g, g)).unflatten(0, (rows, columns))
        return cells.transpose(1, 2).flatten(0, 3)

    def lay_out(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, seen: Seen
    ) -> tuple[Expanded, Tensor]:
        """The text with every picture's places, `[whole] separator [kept tokens]`, and the visual tokens for them `[V, C]`.

        Padding of the input is dropped; the result has it on the right. **Raises** ValueError when pictures and image tokens
        differ in number.
        """
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        image = (input_ids == self.tokens.image) & keep
        rows = image.nonzero()[:, 0].tolist()
        if len(rows) != seen.pictures:
            raise ValueError(f"images: got {seen.pictures}, expected {len(rows)}, as many as image tokens")
        runs, media, words = [], [], {}
        for picture, row in enumerate(rows):
            parts = [] if seen.whole is None else [seen.whole[picture]]
            if seen.local is not None:
                if row not in words:
                    words[row] = self.lm.embed(input_ids[row][keep[row] & ~image[row]])
                parts.append(self._kept(seen.local[picture], words[row]))
            media += parts
            places = [[self.tokens.image] * len(part) for part in parts]
            runs.append(places[0] if len(places) == 1 else [*places[0], self.config.separator, *places[1]])
        made = place_runs(input_ids, self.tokens, runs, attention_mask=attention_mask, labels=labels)
        none = self.lm.embedding.weight.new_zeros(0, self.config.lm.block.width)
        return made, torch.cat(media) if media else none

    def _kept(self, local: Tensor, words: Tensor) -> Tensor:
        told = torch.ones(len(words), dtype=torch.bool, device=words.device)
        return local[self.router(local, words.to(local.dtype), told)]

    def told(
        self,
        looked: Sequence[Any],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Expanded, Tensor]:
        return self.lay_out(input_ids, attention_mask, labels, self.encode(self.arrange(looked)))

    def arrange(self, looked: Sequence[Any]) -> Tiles:
        return Tiles(torch.stack(super().arrange(looked)), [one.plan.grid for one in looked])

    def forward(
        self,
        images: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        media: Any = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """As `MultimodalModel.forward`, with `Tiles` for images, one image token for each, and `Seen` for media."""
        given: Any = media if images is None or media is not None else self.encode(images)
        if _looked(given) and input_ids is not None:
            self._check(input_ids, attention_mask, labels, None)
            made, flat = self.lay_out(input_ids, attention_mask, labels, given)
            input_ids, attention_mask, labels, given = made.ids, made.mask, made.labels, flat
        return super().forward(
            None, input_ids, attention_mask, labels, media=given, cache=cache, last_only=last_only
        )

    @torch.no_grad()
    def generate(
        self,
        images: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        media: Any = None,
        **options: Any,
    ) -> Tensor:
        """As `MultimodalModel.generate`; the router is asked once, before the first token."""
        given: Any = media if images is None or media is not None else self.encode(images)
        if _looked(given) and input_ids is not None:
            made, given = self.lay_out(input_ids, attention_mask, None, given)
            input_ids, attention_mask = made.ids, made.mask
        return super().generate(None, input_ids, attention_mask, media=given, **options)

    def _reachable(self, x: Tensor) -> Tensor:
        learns = self.training and torch.is_grad_enabled()
        if not (learns and any(p.requires_grad for part in self.sees() for p in part.parameters())):
            return x
        side = self.config.vision.image_size
        seen = self.encode(Tiles(x.new_zeros(2, 3, side, side), [(1, 1)]))
        parts = [part.mean() for part in (seen.whole, *(seen.local or ())) if part is not None]
        return x + 0 * torch.stack(parts).sum().to(x.dtype)

    def published(self, source: str) -> Table:
        """The authors' file; the tower, which they never train, may be missing."""
        parts = {"adapter.": "model.mm_projector.", "sampler.": "model.sampler.post_qformer."}
        table = self.lm.published(self.lm.config.family).under("lm.", "")
        table += self.vision.published("huggingface_clip").under("vision.", TOWER)
        for ours, theirs in parts.items():
            table += getattr(self, ours[:-1]).published(source).under(ours, theirs)
        if self.config.router == "qformer":
            table += self.router.published(source).under("router.", "model.sampler.selector.")
        return table + Table((), absent=(r"vision\..*",))
