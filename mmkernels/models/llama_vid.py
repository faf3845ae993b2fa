"""LLaMA-VID: every frame of a video is two tokens of the text, one that answers the prompt and one of content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.layers._published import Table
from mmkernels.layers.context_attention import NEIGHBOURS, ContextAttention, content_tokens
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.qformer_layer import QFormerConfig
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import Cache, MultimodalModel, Output, Tokens, fill_places
from mmkernels.models.places import expand_images as expand_images
from mmkernels.models.places import pad_rows
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

_QFORMER = QFormerConfig(text_head=False)


@dataclass(frozen=True)
class ConnectorConfig:
    """Arguments of `ContextAttention`; its widths are the tower's and the language model's."""

    qformer: QFormerConfig = _QFORMER
    compress: str = "mean"
    select: str = "patch"
    block: int = 64


@dataclass(frozen=True)
class LlamaVidConfig:
    """A whole LLaMA-VID. `stages` are its training recipe; the last one says what a freshly built model trains.

    `tokens.image` is the id that stands for one visual token; it has no row in the embedding, so the published -200 will do.
    `max_prompt` is the longest text the Q-Former is given.
    """

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    stages: tuple[Stage, ...]
    connector: ConnectorConfig = ConnectorConfig()
    max_prompt: int = 256

    @property
    def tokens_per_frame(self) -> int:
        return 1 + content_tokens(self.connector.compress, self.vision.patches)


class LlamaVid(MultimodalModel):
    """See `LlamaVidConfig`. Visual tokens take the places of `tokens.image` in the text, in order.

    Prompts are texts for the Q-Former, in its own vocabulary: prompt j of a sample reads every frame of it, and its tokens go
    to the j-th run of places. `expand_images` makes those runs out of one place for each; long videos, whose frames stand
    between subtitles, are written with two places a frame to begin with.
    """

    sources = ("llama_vid",)

    def __init__(self, config: LlamaVidConfig) -> None:
        super().__init__()
        self.config, self.tokens, c = config, config.tokens, config.connector
        self.vision = VisionTower(config.vision)
        self.connector = ContextAttention(
            config.vision.width, config.lm.block.width, qformer=c.qformer, compress=c.compress, select=c.select,
            block=c.block,
        )  # fmt: skip
        self.lm = Decoder(config.lm)
        config.stages[-1].freeze(self)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def encode(
        self, images: Tensor, prompt_ids: Tensor | None = None, prompt_mask: Tensor | None = None
    ) -> Tensor:
        """Pictures or videos and the prompts that ask about them -> visual tokens `[B, P, F * tokens_per_frame, C]`.

        **Shapes** images `[B, I, 3, H, W]` or `[B, I, F, 3, H, W]`; prompt_ids `[B, P, L]`, prompt_mask bool, True at text. One
        image (I = 1) is read by all P prompts; otherwise I = P, and prompt j reads image j. Tower and connector run in
        blocks of frames: patches of all frames never exist at once unless a gradient needs them.
        **Raises** ValueError for shapes, missing prompts and too long ones.
        """
        images = images.unsqueeze(2) if images.dim() == 5 else images
        _check.shapes(images=(images, "B I F 3 H W"))
        return self._read(images, prompt_ids, prompt_mask, self.vision)

    def encode_features(
        self, features: Tensor, prompt_ids: Tensor | None = None, prompt_mask: Tensor | None = None
    ) -> Tensor:
        """As `encode`, from what the tower gave before: features `[B, I, F, M, Cv]`, stored without class token or with it."""
        _check.shapes(features=(features, f"B I F M {self.config.vision.width}"))
        return self._read(features, prompt_ids, prompt_mask, None)

    def _read(
        self, frames: Tensor, ids: Tensor | None, mask: Tensor | None, tower: Callable[..., Any] | None
    ) -> Tensor:
        b, i = frames.shape[:2]
        if ids is None:
            raise ValueError("prompt_ids: got None beside images, expected the prompts' token ids [B, P, L]")
        size = _check.shapes(prompt_ids=(ids, "B P L"), prompt_mask=(mask, "B P L"))
        if size["B"] != b or i not in (1, size["P"]):
            raise ValueError(
                f"prompt_ids: got {size['B']} samples of {size['P']} prompts for {b} samples of {i} images, "
                "expected as many samples, and one image or as many as prompts"
            )
        if size["L"] > self.config.max_prompt:
            raise ValueError(
                f"prompt_ids: got {size['L']} tokens, expected at most {self.config.max_prompt}; see pad_prompts"
            )
        if i > 1:  # every prompt has an image of its own
            ids, mask = (
                ids.flatten(0, 1).unsqueeze(1),
                None if mask is None else mask.flatten(0, 1).unsqueeze(1),
            )
        frames = frames.flatten(0, 1)
        tokens = self.connector(
            frames if tower else frames.to(self.connector.key.weight.dtype), ids, mask, tower=tower
        )
        return tokens.reshape(b, size["P"], -1, tokens.shape[-1])

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` with one image token a picture or video -> ids with its places, and their mask, padded on the right."""
        count = frames * self.config.tokens_per_frame
        places = expand_images(input_ids, self.tokens, count, attention_mask=attention_mask)
        return places.ids, places.mask

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Text embeddings `[B, T, C]` with the rows of media `[B, P, R, C]` at the places for them, in order."""
        place = input_ids == self.tokens.image
        text = self.lm.embed(torch.where(place, 0, input_ids))
        rows = 0 if media is None else media.shape[1] * media.shape[2]
        self._check_places(place, rows)
        if media is None or rows == 0:
            return text
        _check.shapes(input_ids=(input_ids, "B T"), media=(media, f"B P R {text.shape[-1]}"))
        return fill_places(text, place, media.flatten(1, 2))

    def _check_places(self, place: Tensor, rows: int) -> None:
        if place.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        counts = place.sum(1)
        if bool(((counts != rows) & (counts != 0)).any()):
            got = ", ".join(str(int(n)) for n in counts)
            raise ValueError(
                f"input_ids: got {got} places for visual tokens, expected {rows} in every row (or 0: text alone)"
            )

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        media: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """As `MultimodalModel.forward`, with the prompts of `encode` beside the images."""
        if media is None and images is not None:
            media = self.encode(images, prompt_ids, prompt_mask)
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
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        media: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `MultimodalModel.generate`, with the prompts of `encode` beside the images."""
        if media is None and images is not None:
            media = self.encode(images, prompt_ids, prompt_mask)
        return super().generate(None, input_ids, attention_mask, media=media, **options)

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        known = ids if ids.is_floating_point() else torch.where(ids == self.tokens.image, 0, ids)
        super()._check(known, mask, labels, cache)

    def published(self, source: str) -> Table:
        """The released file: language model, connector, and the tower where it was saved with them."""
        joint = self.connector.published(source)
        ignored = tuple(pattern for pattern in joint.ignored if pattern != NEIGHBOURS)
        table = Table(joint.rules, joint.absent, ignored).under("connector.", "model.")
        table += self.lm.published(self.config.lm.family).under("lm.", "")
        tower = self.vision.published("eva").under("vision.", "model.vision_tower.vision_tower.")
        return table + tower + Table((), absent=(r"vision\..*",))


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, pad: int = 0, limit: int = 256, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids of prompts as one batch: (ids `[P, L]`, mask bool `[P, L]`), padded on the right.

    What is longer than `limit` loses its beginning, as published; a leading token `first` (BERT's [CLS]) stays.
    """
    _check.positive(limit=limit, prompts=len(prompts))
    kept = []
    for ids in prompts:
        head = list(ids[:1]) if len(ids) > limit and ids[0] == first else []
        tail = ids[max(len(head), len(ids) - limit + len(head)) :]
        kept.append(torch.tensor([*head, *tail], dtype=torch.int64))
    return pad_rows(kept, pad)


def rotary_scaling(length: int, context: int) -> float:
    """The published stretch of rotary positions for texts of `length` tokens: `ceil(length / context)`, at least 1."""
    _check.positive(length=length, context=context)
    return float(max(1, -(-length // context)))
