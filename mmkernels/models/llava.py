"""LLaVA, LLaVA-1.5, LLaVA-NeXT, LLaVAR, SVIT, Yi-VL: patches of a ViT, through a projector, are words of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.projector import Projector
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.anyres import Media, Plan, order_views
from mmkernels.models.anyres import merge_anyres as merge_anyres
from mmkernels.models.base import Cache, MultimodalModel, Output, Tokens
from mmkernels.models.llava_tables import published
from mmkernels.models.places import expand_images
from mmkernels.models.splice import splice as splice
from mmkernels.models.stages import Stage
from mmkernels.ops.sliced_image import splice_embeddings
from mmkernels.primitives import _check


@dataclass(frozen=True)
class LlavaConfig:
    """A whole LLaVA. `vision.select_layer` and `vision.keep_class` say which features the `projector` (a kind of
    `layers.Projector`) is given.

    `aspect` is what becomes of a picture: its central square ("square"), a square padded with the mean colour ("pad"), or the
    picture in tiles of the tower's size behind one of all of it ("anyres": `pinpoints` are sizes (width, height) in pixels,
    the first one wins where two are alike, `rounding` and `merge` are `data.slicing.llava_next`'s). `tokens.image` stands for
    one visual token; it needs no row in the embedding. `marks` are the tokens before and behind a picture's places, where
    there are such. `template` is a name in `llava_text.TEMPLATES`. `stages` are the training recipe; the last one says what a
    freshly built model trains.
    """

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    stages: tuple[Stage, ...]
    projector: str = "mlp2x_gelu"
    aspect: str = "pad"
    pinpoints: tuple[tuple[int, int], ...] = ()
    rounding: str = "llava"
    merge: str = "unpad"
    template: str = "v1"
    marks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check.choice("aspect", self.aspect, ("square", "pad", "anyres"))
        if self.aspect == "anyres" and self.marks is not None:
            raise ValueError(f"marks: got {self.marks} for aspect 'anyres', expected None")
        if (self.aspect == "anyres") != bool(self.pinpoints):
            raise ValueError(
                f"pinpoints: got {len(self.pinpoints)} for aspect {self.aspect!r}, expected them with 'anyres' alone"
            )

    @property
    def places(self) -> int:
        """Tokens of a picture that is one square; a newline behind it where pictures may be in tiles."""
        return self.vision.patches + self.vision.keep_class + (self.aspect == "anyres")


class Llava(MultimodalModel):
    """See `LlavaConfig`. Visual tokens take the places of `tokens.image`, in the order of the batch: row by row.

    Rows may have any number of pictures, none too. `models.llava.splice` is the authors' way from one token a picture to
    embeddings, masks and labels; `expand` makes places of it for this model.
    """

    sources = ("llava", "llava_next", "yi_vl", "huggingface")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.tokens, width = config, config.tokens, config.lm.block.width
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.projector, config.vision.width, width)
        newline = torch.randn(width) * width**-0.5
        self.image_newline = nn.Parameter(newline) if config.aspect == "anyres" else None
        self.lm = self.language_model()
        config.stages[-1].freeze(self)

    def language_model(self) -> Decoder:
        """The decoder; families whose blocks differ make another."""
        return Decoder(self.config.lm)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def encode(self, images: Tensor, plans: Sequence[Plan] | None = None) -> Tensor:
        """Pictures -> the visual tokens `[V, C]` of all of them, one after another; a frozen side records no gradient.

        **Shapes** images `[B, I, 3, S, S]`, or `[N, 3, S, S]` where rows have different numbers of them, or packed patches as
        `features` takes them. With `plans`
        (`data.slicing.llava_next`), one a picture: the views of all of them as `[N, 3, S, S]`, the whole picture before its
        tiles, or `[I, T, 3, S, S]`, where views behind a picture's own are not read. A model of tiles that is given no plans
        takes every picture for a single tile.
        **Raises** ValueError for shapes, and for plans that do not fit.
        """
        rows, order = self.look(images, plans)
        if self.image_newline is None:
            return rows
        newline = self.image_newline.to(rows.dtype)[None]
        return torch.cat([rows, newline])[torch.where(order < 0, len(rows), order)]

    def look(self, images: Tensor, plans: Sequence[Plan] | None = None) -> Media:
        """As `encode`, before the tokens are put in their order: `embed` does that as it puts them into the text."""
        if plans is None:
            images = images.flatten(0, 1) if images.dim() == 5 else images
            x = self.features(images)
            order = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
            if self.image_newline is not None:
                order = F.pad(order, (0, 1), value=-2)
            return Media(x.flatten(0, 1), order.flatten())
        if self.image_newline is None:
            raise ValueError(f"plans: got {len(plans)} for aspect {self.config.aspect!r}, expected None")
        if images.dim() == 5:
            images = _views(images, plans)
        return order_views(self.features(images), plans, rounding=self.config.rounding)

    def features(self, images: Tensor) -> Tensor:
        """images `[N, 3, S, S]`, or the rows of their patches `[N * patches, 3 patch_size^2]` as `data.front_end` packs them,
        -> projected features `[N, P, C]`.
        """
        v = self.config.vision
        if images.dim() == 2:
            views = _check.shapes(patches=(images, f"R {3 * v.patch_size**2}"))["R"] // v.patches
            if len(images) != views * v.patches:
                raise ValueError(f"patches: got {len(images)} rows, expected whole views of {v.patches}")
            hw = torch.full((views, 2), v.image_size // v.patch_size, device=images.device)
            x = self.vision(images, hw).view(views, v.patches + v.keep_class, v.width)
        else:
            x = self.vision(images)
        return self.projector(x.to(self.projector.input.weight.dtype))

    def expand(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        frames: int = 1,
        plans: Sequence[Plan] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` with one image token a picture -> ids with its places, and their mask, padded on the right.

        `plans` as for `encode`: one a picture, in the order of the batch.
        """
        c, counts = self.config, None if plans is None else [plan.tokens for plan in plans]
        first, last = ([], []) if c.marks is None else ([c.marks[0]], [c.marks[1]])
        run = [*first, *[self.tokens.image] * c.places, *last]
        places = expand_images(input_ids, self.tokens, run, attention_mask=attention_mask, counts=counts)
        return places.ids, places.mask

    def embed(self, input_ids: Tensor, media: Tensor | Media | None) -> Tensor:
        """Text embeddings `[B, T, C]` with the visual tokens (`[V, C]`, or what `look` gave) at the places for them."""
        place = input_ids == self.tokens.image
        known = 0 <= self.tokens.image < self.config.lm.vocab
        x = self.lm.embed(input_ids if known else torch.where(place, 0, input_ids))
        if isinstance(media, Tensor):
            _check.shapes(media=(media, f"V {x.shape[-1]}"))
            media = Media(media, torch.arange(media.shape[0], device=media.device))
        count = 0 if media is None else len(media.order)
        if media is None or count == 0:
            return self.keep_reachable(x, [self.vision, self.projector], self.config.vision.image_size)
        at = (place.flatten().cumsum(0) - 1).clamp(0, count - 1)
        positions = torch.where(place, media.order[at].view_as(place), -1)
        newline = None if self.image_newline is None else self.image_newline[None]
        return splice_embeddings(x, media.rows, positions, special=newline)

    def condition(self, input_ids: Tensor, media: Tensor | Media | None, cache: Cache | None) -> None:
        """Nothing between the blocks; on CPU places are counted where a text begins: later a model may write such tokens."""
        rows = 0 if media is None else len(media.order if isinstance(media, Media) else media)
        begins = cache is None or cache.text.length == 0
        if not (begins or rows) or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        place = input_ids == self.tokens.image
        found = int(place.sum())
        if found != rows:
            counts = ", ".join(map(str, place.sum(1).tolist()))
            raise ValueError(
                f"input_ids: got {found} places for visual tokens (by row: {counts}), expected {rows}, as many as there are"
            )

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        plans: Sequence[Plan] | None = None,
        media: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """As `MultimodalModel.forward`, with the images and plans of `encode`, and its `[V, C]` for media."""
        if media is None and images is not None:
            media = self.look(images, plans)  # type: ignore[assignment]
        return super().forward(
            None, input_ids, attention_mask, labels, media=media, cache=cache, last_only=last_only
        )

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        plans: Sequence[Plan] | None = None,
        media: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `MultimodalModel.generate`, with the images and plans of `encode`."""
        if media is None and images is not None:
            media = self.look(images, plans)  # type: ignore[assignment]
        return super().generate(None, input_ids, attention_mask, media=media, **options)

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        known = ids if ids.is_floating_point() else torch.where(ids == self.tokens.image, 0, ids)
        super()._check(known, mask, labels, cache)

    def published(self, source: str) -> Table:
        """The authors' file (`llava`, `llava_next`, `yi_vl`), where the frozen tower of the first and last may be missing, or
        Hugging Face's, of any release.
        """
        return published(self, source)


def _views(images: Tensor, plans: Sequence[Plan]) -> Tensor:
    """The views `[N, 3, S, S]` that the plans read of pictures `[I, T, 3, S, S]` padded to one number of them."""
    size = _check.shapes(images=(images, "I T 3 H W"))
    most = max((plan.views for plan in plans), default=0)
    if size["I"] != len(plans) or size["T"] < most:
        raise ValueError(
            f"images: got {size['I']} pictures of {size['T']} views, expected {len(plans)} of {most} or more, as plans say"
        )
    kept = [row[: plan.views] for row, plan in zip(images, plans, strict=True)]
    return torch.cat(kept) if kept else images.flatten(0, 1)
