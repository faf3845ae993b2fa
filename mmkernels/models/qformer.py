"""Queries between a frozen tower and a language model: BLIP-2, InstructBLIP and InternLM-XComposer.

`qformer_seq2seq` has the same before an encoder-decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.layers.lora import LoraConfig, add_lora, lora_table
from mmkernels.layers.qformer import QFormer
from mmkernels.layers.qformer_layer import QFormerConfig
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.models.base import Cache, MultimodalModel, Output, Tokens
from mmkernels.models.places import expand_images as expand_images
from mmkernels.models.qformer_batches import instruction_batch as instruction_batch
from mmkernels.models.qformer_batches import instruction_labels as instruction_labels
from mmkernels.models.qformer_batches import turn_labels as turn_labels
from mmkernels.models.qformer_stage1 import HeadsConfig, Stage1Heads, Stage1Losses, VisionNorm
from mmkernels.models.qformer_stage1 import Stage1 as Stage1
from mmkernels.models.qformer_stage1 import Stage1Config as Stage1Config
from mmkernels.models.qformer_tables import blip2_table
from mmkernels.models.ranking import rank_candidates as rank_candidates
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check


@dataclass(frozen=True)
class Blip2Config:
    """A whole model. `stages` are its training recipe; the last one says what a freshly built model trains.

    `heads` adds stage 1's objectives; `instruct` lets the queries read an instruction (both need the Q-Former's text branch);
    `flags` puts an image's tokens between two learned ones, `lora` updates of low rank into the language model (XComposer).
    `wide_norm` computes `ln_vision` in float32.
    """

    vision: VisionConfig
    qformer: QFormerConfig
    lm: DecoderConfig
    tokens: Tokens
    stages: tuple[Stage, ...]
    heads: HeadsConfig | None = None
    instruct: bool = False
    flags: bool = False
    norm_eps: float = 1e-5
    wide_norm: bool = True
    lora: LoraConfig | None = None

    @property
    def width(self) -> int:
        """The language model's."""
        return self.lm.block.width

    @property
    def image_tokens(self) -> int:
        """Places that one picture takes in the text."""
        return self.qformer.num_query + 2 * self.flags


class Instruction(NamedTuple):
    """What the queries are told, in the Q-Former's own vocabulary: ids `[B, L]`, mask bool `[B, L]`, None for all of it."""

    ids: Tensor
    mask: Tensor | None = None


class Blip2(MultimodalModel):
    """See `Blip2Config`. A picture's tokens take the places of `tokens.image` in the text, in order; `expand` makes the places.

    **Source** BLIP-2 (arXiv 2301.12597), InstructBLIP (arXiv 2305.06500), InternLM-XComposer (arXiv 2309.15112); weights of
    `lavis`, `xcomposer` and `huggingface` load by `weights.load`.
    """

    sources = ("lavis", "xcomposer", "huggingface")

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config, self.tokens, c = config, config.tokens, config
        if c.qformer.image_width != c.vision.width:
            raise ValueError(
                f"image_width: got {c.qformer.image_width}, expected the tower's {c.vision.width}"
            )
        if (c.instruct or c.heads) and not c.qformer.vocab:
            raise ValueError("vocab: got 0, expected the text branch that instructions and stage 1 need")
        self.vision = VisionTower(c.vision)
        self.ln_vision = (VisionNorm if c.wide_norm else nn.LayerNorm)(c.vision.width, c.norm_eps)
        self.qformer = QFormer(c.qformer)
        self.heads = None if c.heads is None else Stage1Heads(c.heads, c.qformer.hidden)
        self.proj = nn.Linear(c.qformer.hidden, c.width)
        if c.flags:  # published as parameters that nothing trains
            self.flag_start, self.flag_end = (nn.Parameter(torch.zeros(c.width)) for _ in range(2))
        self.lm = self._language_model()
        c.stages[-1].freeze(self)

    def _language_model(self) -> Any:
        decoder = Decoder(self.config.lm)
        if self.config.lora is not None:
            add_lora(decoder, self.config.lora)
        return decoder

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def image_features(self, images: Tensor) -> Tensor:
        """Pictures `[N, 3, S, S]` -> what the Q-Former reads, `[N, 1 + P, Cv]`; a frozen tower records no gradient."""
        return self.ln_vision(self.vision(images)).to(self.qformer.query_tokens.dtype)

    def encode(self, images: Tensor, instruction: Instruction | None = None) -> Tensor:
        """Pictures or videos -> the language model's tokens `[B, I * F * image_tokens, C]`, frame by frame.

        **Shapes** images `[B, I, 3, H, W]` or `[B, I, F, 3, H, W]`; every picture of a sample reads its instruction.
        **Raises** ValueError for shapes, and for an instruction that is missing, or that these queries cannot read.
        """
        images = images.unsqueeze(2) if images.dim() == 5 else images
        size = _check.shapes(images=(images, "B I F 3 H W"))
        if (instruction is not None) != self.config.instruct:
            came, expected = ("None", "ids") if instruction is None else ("ids", "None")
            raise ValueError(
                f"instruction: got {came}, expected {expected}: its queries "
                f"{'read' if self.config.instruct else 'do not read'} instructions"
            )
        tokens = self.image_features(images.flatten(0, 2))
        if instruction is None:
            queries = self.qformer(tokens)
        else:
            each = size["I"] * size["F"]
            ids, mask = (None if t is None else t.repeat_interleave(each, 0) for t in instruction)
            queries = self.qformer(tokens, text_ids=ids, text_mask=mask, mode="instruct")
        media = self.proj(queries[:, : self.config.qformer.num_query])
        if self.config.flags:
            flags = (
                flag.to(media.dtype).expand(len(media), 1, -1) for flag in (self.flag_start, self.flag_end)
            )
            start, end = flags
            media = torch.cat([start, media, end], 1)
        return media.reshape(size["B"], -1, media.shape[-1])

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` with one image token a picture, or a video of `frames` -> ids with as many as it takes, and their mask,
        padded on the right.
        """
        count = frames * self.config.image_tokens
        places = expand_images(input_ids, self.tokens, count, attention_mask=attention_mask)
        return places.ids, places.mask

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Text embeddings `[B, T, C]` with the rows of media `[B, R, C]` at the places for them, in order."""
        text = self.lm.embed(input_ids)
        if media is None:
            return text
        _check.shapes(input_ids=(input_ids, "B T"), media=(media, f"B R {text.shape[-1]}"))
        place, rows = input_ids == self.tokens.image, media.shape[1]
        if place.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = place.sum(1)
            if bool(((counts != rows) & (counts != 0)).any()) or not bool(counts.any()):
                raise ValueError(
                    f"input_ids: got {counts.tolist()} places for media, expected {rows} in a row, or 0 for text alone; "
                    "see expand"
                )
        index = (place.cumsum(1) - 1).clamp(0, rows - 1).unsqueeze(-1).expand_as(text)
        return torch.where(place.unsqueeze(-1), media.to(text.dtype).gather(1, index), text)

    def forward(  # type: ignore[override]
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        instruction: Instruction | None = None,
        media: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """As `MultimodalModel.forward`; `instruction` is what the queries read beside the images."""
        if media is None and images is not None:
            media = self.encode(images, instruction)
        return super().forward(
            None, input_ids, attention_mask, labels, media=media, cache=cache, last_only=last_only
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        instruction: Instruction | None = None,
        media: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `MultimodalModel.generate`, whose options it takes."""
        if media is None and images is not None:
            media = self.encode(images, instruction)
        return super().generate(None, input_ids, attention_mask, media=media, **options)

    def stage1(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Stage1Losses:
        """Stage 1's losses of pictures `[B, 3, S, S]` with texts for the Q-Former; see `Stage1`."""
        if self.heads is None:
            raise ValueError("heads: got None, expected a config with the heads of stage 1")
        tokens = self.image_features(images)
        return self.heads.losses(self.qformer, tokens, input_ids, attention_mask, image_ids, generator)

    def published(self, source: str) -> Table:
        """Where the released files keep the model; what was frozen may be missing from LAVIS'."""
        lm = self.config.lm.family
        root = {"lavis": f"{lm if lm == 'opt' else 'llm'}_model.", "xcomposer": "internlm_model."}.get(source)
        table = self.lm.published(lm)
        if self.config.lora is not None:
            table = lora_table(self.config.lora) + table
        return blip2_table(self, source) + table.under("lm.", root or "language_model.")
