"""CogVLM: in every layer of a language model that stays as it is, image tokens have weights of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from mmkernels.layers import eva_table
from mmkernels.layers._published import Rule, Table
from mmkernels.layers.attention import KVCache, Visibility
from mmkernels.layers.decoder import Block, Decoder, DecoderConfig
from mmkernels.layers.decoder_tables import embedding_rules
from mmkernels.layers.expert_linear import Shared
from mmkernels.layers.projector import Projector
from mmkernels.layers.vision import VisionConfig, VisionTower
from mmkernels.layers.visual_expert import VisualExpertBlock
from mmkernels.models.base import Cache, MultimodalModel, Tokens, fill_places
from mmkernels.models.places import expand_images
from mmkernels.models.stages import Stage
from mmkernels.ops.visual_expert import image_positions
from mmkernels.primitives import _check


@dataclass(frozen=True)
class CogVLMConfig:
    """A whole CogVLM. `hidden` is the inner width of the adapter; CogVLM2 has `conv` and `vision_bias`.

    `lm` describes the language model that the layers extend. `begin` is the token that begins a text, `tokens.image` stands
    for one place of an image; it needs no row in the embedding. `table_mode` is `VisualExpertAttention`'s. `stages` are the
    training recipe; the last one says what a freshly built model trains.
    """

    vision: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    begin: int
    hidden: int
    stages: tuple[Stage, ...]
    conv: bool = False
    vision_bias: bool = False
    table_mode: str = "fp32"

    @property
    def places(self) -> int:
        """Tokens of an image: begin, patches, end."""
        return self.vision.patches // (4 if self.conv else 1) + 2


class Types(NamedTuple):
    """types int64 `[B, T]`, 1 at the places of images; `plain` when there are none, nor were any before."""

    types: Tensor
    plain: bool


class CogVLM(MultimodalModel):
    """See `CogVLMConfig`. The text is `[begin] [image places] words`; places hold `tokens.image`, and an image's tokens take
    them in order. All patches of an image share one position; everything is causal.

    Places decide the experts (`layers.expert_mask`) and the positions (`layers.image_positions`): where images touch they
    count as one, as in the published code. Vision experts start as copies of the text's weights. Texts without images run
    through the language model's own blocks, so their outputs are its own bit for bit.
    """

    sources = ("cogvlm", "cogvlm2", "cogvlm_sat")
    packs = False  # positions and experts are made of whole rows

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.config, self.tokens, lm = config, config.tokens, config.lm
        self.vision = VisionTower(config.vision)
        self.projector = Projector(
            "swiglu", config.vision.width, lm.block.width, hidden=config.hidden, conv=config.conv
        )
        self.lm = Decoder(lm, make_block=self._make_block)
        self.copy_text_to_vision()
        with torch.device("meta"):
            self._plain = (Block(lm.block),)  # in a tuple: it has no parameters of its own
        config.stages[-1].freeze(self)

    def _make_block(self, layer: int) -> VisualExpertBlock:
        c, b = self.config, self.config.lm.block
        return VisualExpertBlock(
            b.width, b.heads, b.hidden, kv_heads=b.kv_heads, head_dim=b.head_dim, vision_bias=c.vision_bias,
            rotary_base=c.lm.rotary_base, table_mode=c.table_mode, eps=b.eps, layer=layer,
        )  # fmt: skip

    def copy_text_to_vision(self) -> None:
        """Lets every vision expert start as the text's weights, once those of the language model are in place."""
        for block in self.lm.blocks:
            block.copy_text_to_vision()  # type: ignore[operator]

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` with one image token a picture -> ids with its places, behind the beginning, and their mask.

        Rows that have the beginning already keep it; padding of the result is on the right.
        """
        _check.shapes(input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"))
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        start = keep.to(torch.int8).argmax(1, keepdim=True)
        begins = input_ids.gather(1, start) == self.config.begin
        ids = torch.cat([torch.full_like(begins, self.config.begin, dtype=input_ids.dtype), input_ids], 1)
        places = expand_images(
            ids, self.tokens, self.config.places, attention_mask=torch.cat([~begins, keep], 1)
        )
        return places.ids, places.mask

    def encode(self, images: Tensor) -> Tensor:
        """images `[B, I, 3, S, S]` -> `[B, I, places, C]`; a frozen side records no gradient."""
        size = _check.shapes(images=(images, "B I 3 H W"))
        x = self.vision(images.flatten(0, 1)).to(self.projector.input.weight.dtype)
        return self.projector(x).unflatten(0, (size["B"], size["I"]))

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> Types:
        """See `Types`. A sequence that goes on without new images has no places of any."""
        width = self.config.lm.block.width
        images = 0
        if media is not None:
            shape = f"B I {self.config.places} {width}"
            images = _check.shapes(input_ids=(input_ids, "B T"), media=(media, shape))["I"]
        before: dict[str, Any] = cache.media if cache is not None and cache.text.length else {}
        plain = not images and not before.get("images") and not self._experts_learn()
        if before and not images:
            return Types(torch.zeros_like(input_ids, dtype=torch.int64), plain)
        place = input_ids == self.tokens.image
        self._check_places(place, images)
        return Types(place.long(), plain)

    def _experts_learn(self) -> bool:
        """Whether vision experts get gradients, of which they have zeros, not none, from a batch without images."""
        return torch.is_grad_enabled() and any(
            p.requires_grad for name, p in self.lm.named_parameters() if ".vision." in name
        )

    def _check_places(self, place: Tensor, images: int) -> None:
        if place.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        expected, counts = images * self.config.places, place.sum(1).tolist()
        wrong = next((n for n, count in enumerate(counts) if count != expected), None)
        if wrong is not None:
            raise ValueError(
                f"input_ids: row {wrong} has {counts[wrong]} places for images, expected {expected}: {images} images of "
                f"{self.config.places} tokens"
            )

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Text embeddings `[B, T, C]`, the tokens of images at their places."""
        place = input_ids == self.tokens.image
        known = torch.where(place, 0, input_ids) if self.tokens.image < 0 else input_ids
        x = self.lm.embed(known)
        if media is None or media.shape[1] == 0:
            return self.keep_reachable(x, [self.vision, self.projector], self.config.vision.image_size)
        return fill_places(x, place, media.flatten(1, 2))

    def place(
        self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, condition: Types
    ) -> tuple[Tensor, Shared | Visibility]:
        """Positions are made of the whole row: a sequence that goes on remembers the types of its tokens, and its padding."""
        types, mask = condition.types, attention_mask
        if cache is not None:
            kept: dict[str, Any] = cache.media
            if cache.text.length:
                mask = torch.ones_like(types, dtype=torch.bool) if mask is None else mask
                types, mask = torch.cat([kept["types"], types], 1), torch.cat([kept["mask"], mask], 1)
            kept["types"], kept["images"] = types, not condition.plain
            kept["mask"] = torch.ones_like(types, dtype=torch.bool) if mask is None else mask
        positions = image_positions(types, mask)[:, -x.shape[1] :]
        first: Any = self.lm.blocks[0]
        text = None if cache is None else cache.text
        shared = first.attention.share(x, condition.types, positions, key_mask=mask, cache=text)
        return x, shared.seen if condition.plain else shared

    def block(self, index: int, x: Tensor, seen: Shared | Visibility, cache: KVCache | None) -> Tensor:
        block = self.lm.blocks[index]
        if isinstance(seen, Shared):
            return block(x, cache=cache, shared=seen)
        own: dict[str, Tensor] = {
            n.replace(".text.", "."): p for n, p in block.named_parameters() if ".vision." not in n
        }
        return functional_call(self._plain[0], own, (x, seen, cache, index))

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        known = ids
        if self.tokens.image < 0 and not ids.is_floating_point():
            known = torch.where(ids == self.tokens.image, 0, ids)
        super()._check(known, mask, labels, cache)

    def published(self, source: str) -> Table:
        """The released file, Hugging Face's or the training code's."""
        sat, vocab = source == "cogvlm_sat", self.config.lm.vocab
        keys = ("model.embed_tokens", "model.norm", "lm_head")
        ignored = (r".*\.rotary_emb\.inv_freq",)  # constants
        if sat:
            keys = ("transformer.word_embeddings", "transformer.final_layernorm", "mixins.lm.lm_head")
            ignored = (*ignored, r"mixins\.eva\.vit_model\.transformer\.final_layernorm\..*")
        table = Table(
            (
                *embedding_rules(f"{keys[0]}.weight", vocab, ()),
                Rule(r"norm\.weight", (f"{keys[1]}.weight",)),
                Rule(r"head\.weight", (f"{keys[2]}.weight",), lambda t: t[:vocab]),
            )
        ).under("lm.", "")
        for layer, block in enumerate(self.lm.blocks):
            at = "" if sat else f"model.layers.{layer}."
            table += Table(block.published(source).rules).under(f"lm.blocks.{layer}.", at)  # type: ignore[operator]
        tower = eva_table.COGVLM_SAT if sat else eva_table.COGVLM
        projector = self.projector.published(source)
        for name, part in {"vision.": tower, "projector.": projector}.items():
            table += Table(part.rules).under(name, part.within)
        return table + Table((), ignored=ignored)
