"""BLIP-2's first stage: the Q-Former learns to contrast, match and write before it meets a language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.qformer import QFormer
from mmkernels.layers.qformer_layer import KeysValues, QFormerConfig
from mmkernels.layers.vision import EVA_G, VisionConfig, VisionTower
from mmkernels.models.base import IGNORE
from mmkernels.models.gather import gather, gather_with_gradient, rank
from mmkernels.models.qformer_recipes import RETRIEVAL, STAGE1
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

_PUBLISHED = QFormerConfig()
_HIDDEN = -10_000.0  # the published score of a pair that may not be drawn as a negative
_SOFT = 0.1  # label smoothing, of one-hot and of soft targets alike


class VisionNorm(nn.LayerNorm):
    """A LayerNorm that is computed in float32 at least, whatever dtype the tower runs in."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        y = F.layer_norm(
            input.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps
        )
        return y.to(input.dtype)


@dataclass(frozen=True)
class HeadsConfig:
    """`embed` is the width in which images and texts are compared, `bos` the token ([DEC]) that begins a text to write."""

    embed: int = 256
    bos: int = 30_522
    temperature: float = 0.07


@dataclass(frozen=True)
class Stage1Config:
    """Stage 1 as published. Without a `vision` tower images come as its tokens `[B, M, image_width]`.

    `stages` is its recipe; the last one says what a freshly built model trains.
    """

    qformer: QFormerConfig = _PUBLISHED
    vision: VisionConfig | None = EVA_G
    heads: HeadsConfig = HeadsConfig()
    norm_eps: float = 1e-5
    stages: tuple[Stage, ...] = (STAGE1,)


RETRIEVAL_COCO = Stage1Config(vision=replace(EVA_G, image_size=364), stages=(RETRIEVAL,))


class Stage1Losses(NamedTuple):
    """Scalars; `loss = itc + itm + lm`."""

    itc: Tensor
    itm: Tensor
    lm: Tensor
    loss: Tensor


class Stage1Heads(nn.Module):
    """The heads of the three objectives, and their losses on a Q-Former that somebody else owns."""

    def __init__(self, config: HeadsConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.vision_proj, self.text_proj = (nn.Linear(hidden, config.embed) for _ in range(2))
        self.itm_head = nn.Linear(hidden, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature))

    def image_features(self, queries: Tensor) -> Tensor:
        """Query rows `[B, Nq, C]` -> unit vectors `[B, Nq, embed]`."""
        return F.normalize(self.vision_proj(queries), dim=-1)

    def text_features(self, qformer: QFormer, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Texts `[B, L]` -> the unit vectors `[B, embed]` of their first tokens, read without an image."""
        return F.normalize(
            self.text_proj(qformer(None, text_ids=ids, text_mask=mask, mode="itc")[:, 0]), dim=-1
        )

    def match(self, qformer: QFormer, image: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Image tokens with their texts -> logits `[B, 2]` (no, yes): the head's answers averaged over the queries."""
        hidden = qformer(image, text_ids=ids, text_mask=mask, mode="itm")
        return self.itm_head(hidden[:, : qformer.config.num_query]).mean(1)

    def losses(
        self,
        qformer: QFormer,
        image: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Stage1Losses:
        """See `Stage1`; image are the tokens `[B, M, image_width]` that the Q-Former reads."""
        self._check(ids, mask, image_ids, image)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        cache: list[KeysValues] = []
        queries = self.image_features(qformer(image, mode="queries", cache=cache))
        texts = self.text_features(qformer, ids, mask)
        i2t = similarity(queries, gather(texts)) / self.temp
        t2i = similarity(gather(queries), texts).T / self.temp
        same = _same(image_ids, i2t)
        itc = (contrast(i2t, same, image_ids is not None) + contrast(t2i, same, image_ids is not None)) / 2
        itm = self._matching(qformer, image, (ids, mask), (i2t, t2i, same), generator)
        lm = self._writing(qformer, ids, mask, cache)
        return Stage1Losses(itc, itm, lm, itc + itm + lm)

    def _matching(
        self,
        qformer: QFormer,
        image: Tensor,
        text: tuple[Tensor, Tensor],
        scores: tuple[Tensor, Tensor, Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Pairs, each text with a hard image, each image with a hard text; the negatives may come from any rank."""
        (ids, mask), (i2t, t2i, same) = text, scores
        images, all_ids, all_mask = gather_with_gradient(image), gather(ids), gather(mask)
        hard_image = negatives(t2i, same, generator)
        hard_text = negatives(i2t, same, generator)
        logits = self.match(
            qformer,
            torch.cat([image, images[hard_image], image]),
            torch.cat([ids, ids, all_ids[hard_text]]),
            torch.cat([mask, mask, all_mask[hard_text]]),
        )
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(_wide(logits), labels)

    def _writing(self, qformer: QFormer, ids: Tensor, mask: Tensor, cache: list[KeysValues]) -> Tensor:
        """The text given the queries, whose keys and values the contrast has left in the cache."""
        labels = torch.where(mask, ids, IGNORE)
        begun = torch.cat([torch.full_like(ids[:, :1], self.config.bos), ids[:, 1:]], 1)
        hidden = qformer(None, text_ids=begun, text_mask=mask, mode="itg", cache=cache)
        logits = _wide(qformer.lm_head(hidden[:, :-1]))
        targets = labels[:, 1:].flatten()
        total = F.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=IGNORE, label_smoothing=_SOFT, reduction="sum"
        )
        return total / (targets != IGNORE).sum().clamp(min=1)

    def _check(self, ids: Tensor, mask: Tensor | None, image_ids: Tensor | None, image: Tensor) -> None:
        size = _check.shapes(
            input_ids=(ids, "B L"), attention_mask=(mask, "B L"), image_ids=(image_ids, "B"),
            image=(image, "B M C"),
        )  # fmt: skip
        _check.positive(samples=size["B"])
        if size["L"] < 2:
            raise ValueError(
                f"input_ids: got {size['L']} tokens a text, expected [CLS] and one more at least"
            )
        if mask is not None and mask.device.type == "cpu" and not bool(mask[:, 0].all()):
            raise ValueError(
                "attention_mask: got a row whose first token is padding, expected [CLS] there: pad on the right"
            )


def similarity(queries: Tensor, texts: Tensor) -> Tensor:
    """`max_q <queries[i, q], texts[j]>`: `[B, Nq, E]` and `[N, E]` -> `[B, N]`, not yet divided by the temperature."""
    return torch.einsum("iqe,je->ijq", queries, texts).amax(-1)


def contrast(scores: Tensor, same: Tensor, soft: bool) -> Tensor:
    """Cross-entropy of scores `[B, N]` against the pairs in `same`, one a row (smoothed) or, `soft`, several."""
    pairs = same.to(_wide(scores).dtype)
    targets = (1 - _SOFT) * pairs / pairs.sum(1, keepdim=True) + _SOFT / pairs.shape[1] if soft else None
    if targets is None:
        return F.cross_entropy(_wide(scores), same.int().argmax(1), label_smoothing=_SOFT)
    return -(_wide(scores).log_softmax(1) * targets).sum(1).mean()


@torch.no_grad()
def negatives(scores: Tensor, same: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One column for each row of scores `[B, N]`, drawn by softmax; true pairs score -10000 and so are drawn last."""
    odds = _wide(scores).masked_fill(same, _HIDDEN).softmax(1)
    return torch.multinomial(odds, 1, generator=generator).squeeze(1)


def _same(image_ids: Tensor | None, scores: Tensor) -> Tensor:
    """bool `[B, N]`: which texts (images) of all ranks belong to the images (texts) of this one."""
    if image_ids is not None:
        return image_ids.unsqueeze(1) == gather(image_ids)
    b, n = scores.shape
    own = torch.arange(b, device=scores.device).unsqueeze(1) + rank() * b
    return own == torch.arange(n, device=scores.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Stage1(nn.Module):
    """BLIP-2's first stage: `loss = itc + itm + lm` of images with their texts.

    itc: image and text features are contrasted against all ranks' (`s_ij = max_q p_q,i . p_t,j / temp`, smoothing 0.1, gathered
    features without gradient). itm: pairs against one hard negative image a text and one hard negative text an image, drawn by
    `softmax(s)`. lm: the text given the queries, smoothing 0.1. With `image_ids` (retrieval finetuning) samples of one id are
    each other's positives, `0.9 / count + 0.1 / N`, and no negatives.

    **Source** BLIP-2 (arXiv 2301.12597); its stage-1 file loads with the source `lavis`.
    """

    sources = ("lavis",)

    def __init__(self, config: Stage1Config | QFormerConfig) -> None:
        super().__init__()
        c = Stage1Config(config, vision=None) if isinstance(config, QFormerConfig) else config
        self.config = c
        if c.qformer.vocab <= c.heads.bos:
            raise ValueError(
                f"vocab: got {c.qformer.vocab}, expected more than bos = {c.heads.bos}: stage 1 reads and writes text"
            )
        self.vision = None if c.vision is None else VisionTower(c.vision)
        self.ln_vision = None if c.vision is None else VisionNorm(c.vision.width, c.norm_eps)
        self.qformer = QFormer(c.qformer)
        self.heads = Stage1Heads(c.heads, c.qformer.hidden)
        if self.vision is not None:
            c.stages[-1].freeze(self)

    def stages(self) -> list[Stage]:
        """The published recipe; see `Stage`."""
        return list(self.config.stages)

    def tokens(self, image: Tensor) -> Tensor:
        """Pictures `[B, 3, S, S]` -> tokens `[B, M, image_width]`; without a tower they are tokens already."""
        if self.vision is None or self.ln_vision is None:
            return image
        return self.ln_vision(self.vision(image)).to(self.qformer.query_tokens.dtype)

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Stage1Losses:
        """The three losses of a batch.

        **Shapes** image `[B, 3, S, S]` (tokens `[B, M, image_width]` without a tower); input_ids `[B, L]`, [CLS] first, and
        attention_mask bool, padding on the right, of one length L on all ranks; image_ids int64 `[B]`.
        **Gradient** all parameters but the tower's; other ranks' images through itm only. **Edge** one sample alone is its own
        negative. `generator` draws the negatives; None takes torch's. **Raises** ValueError for shapes and padding on the left.
        """
        return self.heads.losses(
            self.qformer, self.tokens(image), input_ids, attention_mask, image_ids, generator
        )

    def published(self, source: str) -> Table:
        """LAVIS' stage-1 file; what was frozen may be missing from it."""
        table = qformer_beside_queries(self.qformer, source)
        table += Table(renames(ln_vision="ln_vision"))
        if self.vision is not None:
            table += self.vision.published("eva").under("vision.", "visual_encoder.")
        heads = renames(vision_proj="vision_proj", text_proj="text_proj", itm_head="itm_head")
        table += Table((*heads, Rule("temp", ("temp",)))).under("heads.", "")
        return table + Table((), absent=(r"vision\..*",))


def qformer_beside_queries(qformer: QFormer, source: str) -> Table:
    """A whole model's file: the Q-Former under its name, the learned queries beside it."""
    theirs = "qformer." if source == "huggingface" else "Qformer."
    queries = Rule(r"qformer\.query_tokens", ("query_tokens",), lambda t: t.flatten(0, 1))
    return Table((queries,)) + qformer.published(source).under("qformer.", theirs)
