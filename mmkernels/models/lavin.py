"""LaVIN: small adapters teach a frozen language model and a frozen tower to answer with a picture and without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.attention import KVCache, Visibility
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import IGNORE, Cache, MultimodalModel, Output, Tokens, fill_places
from mmkernels.models.lavin_text import NOTHING, Marks, lay_out
from mmkernels.models.lavin_text import insert_images as insert_images
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check


@dataclass(frozen=True)
class LavinConfig:
    """A whole LaVIN. The tower has a `class_every`, tower and language model an `adapter` in every block.

    `stages` is its training recipe; the last one says what a freshly built model trains. `hidden` is the width between tower
    and language model, `visual_dtype` one that class tokens are rounded to in between (float16 as published). Decoding goes on
    with the next rotary position, as training does; `decode_lag=1` repeats the prompt's last one, as the published loop does.
    """

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    marks: Marks
    stages: tuple[Stage, ...]
    hidden: int = 128
    visual_dtype: torch.dtype | None = None
    decode_lag: int = 0

    @property
    def places(self) -> int:
        """Tokens of a picture."""
        return self.vision.layers // (self.vision.class_every or 1)


class LavinDecoder(Decoder):
    """A decoder whose rows begin with a token that only adapters read: no other token sees it.

    It attends to itself, and counts as the first position. Once a cached row has begun, it is padding.
    """

    def __init__(self, config: DecoderConfig, lag: int = 0) -> None:
        super().__init__(config)
        self.lag = lag

    def positions(self, mask: Tensor | None, shape: tuple[int, int], cache: KVCache | None) -> Tensor:
        positions = super().positions(mask, shape, cache)
        goes_on = cache is not None and cache.length > 0
        return positions + (1 - self.lag) if goes_on else positions

    def visibility(self, mask: Tensor | None, positions: Tensor, cache: KVCache | None) -> Visibility:
        seen = super().visibility(mask, positions, cache)
        if cache is not None and cache.length > 0:
            return seen
        first = positions.new_zeros(len(positions)) if mask is None else mask.to(torch.int8).argmax(1).int()
        index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
        after = first.unsqueeze(1) + 1
        lo = torch.where(index >= after, torch.maximum(seen.lo, after), seen.lo)
        return seen._replace(lo=lo, hi=torch.maximum(seen.hi, lo), first=first)


class Lavin(MultimodalModel):
    """See `LavinConfig`. A row is `[modality] [bos] prefix, the picture's places if it has one, text`; `expand` writes it.

    Rows with and without a picture may share a batch. Every parameter with `adapter` in its name is trained, and stays in
    float32 at least whatever the model's dtype. Labels 0 are not predicted, as published.
    """

    sources = ("lavin",)
    packs = False  # an adapter's route is decided by a row's first token

    def __init__(self, config: LavinConfig) -> None:
        super().__init__()
        self.config, self.tokens, self.marks = config, config.tokens, config.marks
        _check.choice("decode_lag", config.decode_lag, (0, 1))
        if config.vision.class_every is None:
            raise ValueError(
                "vision: got class_every None, expected after how many blocks class tokens are taken"
            )
        width = config.lm.block.width
        self.vision = VisionTower(config.vision)
        self.lm = LavinDecoder(config.lm, config.decode_lag)
        self.adapter_proj = _projection(config.vision.width, config.hidden, width)
        self.adapter_modality_embedding = nn.Embedding(2, width)
        for name, parameter in self.named_parameters():
            if "adapter" in name:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        config.stages[-1].freeze(self)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Prompts, with one image token each if they have a picture -> whole rows and their mask; see `lay_out`."""
        rows = lay_out(input_ids, self.tokens, self.marks, self.config.places, attention_mask=attention_mask)
        return rows.ids, rows.mask

    def encode(self, images: Tensor) -> Tensor:
        """images `[B, 1, 3, H, W]` -> `[B, 1, places, C]`."""
        size = _check.shapes(images=(images, "B I 3 H W"))
        classes = self.vision(images.flatten(0, 1))
        if self.config.visual_dtype is not None:
            classes = classes.to(self.config.visual_dtype)
        wide: Any = self.adapter_proj[0]
        return self.adapter_proj(classes.to(wide.weight.dtype)).unflatten(0, (size["B"], size["I"]))

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> None:
        """Nothing between the blocks; on CPU the rows' layout is checked."""
        images = 0
        if media is not None:
            shape = f"B I {self.config.places} {self.config.lm.block.width}"
            images = _check.shapes(input_ids=(input_ids, "B T"), media=(media, shape))["I"]
        if images > 1:
            raise ValueError(f"images: got {images} a row, expected one at most")
        begins = cache is None or cache.text.length == 0
        if begins and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_rows(input_ids, images)

    def _check_rows(self, ids: Tensor, images: int) -> None:
        """Reads values: one modality place a row, before the text, and a picture's places where there is one."""
        modality = ids == self.marks.modality
        wrong = (modality.sum(1) != 1).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"input_ids: row {row} has {int(modality[row].sum())} modality places ({self.marks.modality}), expected one; "
                "see expand"
            )
        places, expected = (ids == self.tokens.image).sum(1), self.config.places
        wrong = ((places != 0) & (places != expected)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"input_ids: row {row} has {int(places[row])} image tokens, expected {expected}, or 0 without an image"
            )
        rows = int((places > 0).sum())
        if bool(rows) != bool(images) and len(ids):
            raise ValueError(
                f"images: got {images} a row, and {rows} rows of input_ids with places for one; expected both or neither"
            )

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Token embeddings, the picture's tokens at its places, and the modality's at its own: row 1 with a picture."""
        place, modality = input_ids == self.tokens.image, input_ids == self.marks.modality
        written = torch.where((place & self._beyond(self.tokens.image)) | modality, 0, input_ids)
        x = self.lm.embed(written)
        if media is not None and media.shape[1] > 0:
            x = fill_places(x, place, media.flatten(1, 2))
        else:
            sees = [self.vision, self.adapter_proj]
            x = self.keep_reachable(x, sees, self.config.vision.image_size)
        kind = self.adapter_modality_embedding(place.any(1).long()).to(x.dtype)
        return torch.where(modality.unsqueeze(-1), kind.unsqueeze(1), x)

    def _beyond(self, token: int) -> bool:
        """Whether a token has no row in the embedding."""
        return not 0 <= token < self.config.lm.vocab

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        media: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """As `MultimodalModel.forward`: images `[B, 1, 3, H, W]`, of which those of rows without places are not read by the
        text; labels 0 or -100 where nothing is predicted.
        """
        begins = cache is not None and cache.text.length == 0
        if labels is not None and labels.dtype == torch.int64:
            labels = torch.where(labels == NOTHING, IGNORE, labels)
        output = super().forward(
            images, input_ids, attention_mask, labels, media=media, cache=cache, last_only=last_only
        )
        if cache is not None and begins:
            cache.text.start += 1  # nobody sees the modality's keys and values: they are padding from now on
        return output

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        if not ids.is_floating_point():
            ids = torch.where((ids == self.tokens.image) | (ids == self.marks.modality), 0, ids)
        super()._check(ids, mask, labels, cache)

    def published(self, source: str) -> Table:
        """The authors' whole model; what was frozen may be missing, as from the files of adapters that they release."""
        table = self.lm.published(source).under("lm.", "")
        tower = Table(self.vision.published(source).rules, ignored=(r"ln_post\..*", "proj"))
        table += tower.under("vision.", "backbone.visual.")
        rest = (
            Rule(r"adapter_proj\.0\.(\w+)", ("adapter_proj.conv_A.{0}",)),
            Rule(r"adapter_proj\.2\.(\w+)", ("adapter_proj.conv_B.{0}",)),
            Rule(r"adapter_modality_embedding\.weight", ("adapter_modality_embedding.weight",)),
        )
        return table + Table(rest, (r"(lm|vision)\.(?!.*adapter).*",), (r"backbone\.(?!visual\.).*",))


def _projection(width: int, hidden: int, out: int) -> nn.Sequential:
    """`B silu(A x)`, matrices xavier-uniform, biases 0."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out))
    for layer in (layers[0], layers[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layers
