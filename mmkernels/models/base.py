"""The forward skeleton of every family: media -> tokens -> spliced or cross-attended decoder -> logits; and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers.attention import KVCache
from mmkernels.layers.decoder import Decoder
from mmkernels.models.decoding import Decoding
from mmkernels.models.packing import PackedPrompts
from mmkernels.models.recompute import again
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

IGNORE = -100  # the label of a position that is not predicted


@dataclass(frozen=True)
class Tokens:
    """The token ids a model knows by meaning."""

    image: int
    end_of_chunk: int
    end_of_text: int
    pad: int


@dataclass
class Cache:
    """What a sequence being continued keeps: text keys and values, and whatever the family keeps of its media.

    `media` is the family's own: tensors by sequence, what has a `select(rows)`, or what all sequences share.
    """

    text: KVCache
    media: dict[str, Any] = field(default_factory=dict)

    def select(self, rows: Tensor) -> Cache:
        """A cache of the sequences `rows` `[N]`, some perhaps several times, some not at all."""
        return Cache(self.text.select(rows), {name: _select(kept, rows) for name, kept in self.media.items()})


def _select(kept: Any, rows: Tensor) -> Any:
    if isinstance(kept, Tensor):
        return kept[rows]
    return kept.select(rows) if hasattr(kept, "select") else kept


@dataclass
class Output:
    """loss (scalar, with labels), logits `[B, T, V]`, the cache that was passed in, now longer, and what the last block gave:
    `hidden`, of the positions that have logits.

    Where layers have experts: their `routings`, and the sum of their balancing losses, of which loss has its share.
    """

    logits: Tensor
    loss: Tensor | None = None
    cache: Cache | None = None
    aux_loss: Tensor | None = None
    routings: Sequence[Any] = ()
    hidden: Tensor | None = None


class MultimodalModel(nn.Module):
    """A decoder that is told about media. A family says how media become tokens and where they meet the text."""

    lm: Decoder
    tokens: Tokens
    recompute = False  # set it to keep less for the backward pass; see `models.recompute`
    packs = True  # prompts of unequal length run without their padding: blocks know nothing of a row but what it sees
    balance = 0.01  # what the balancing losses of experts weigh

    def enter(self, stage: Stage) -> None:
        """Becomes what a stage trains: its parameters learn, the others do not."""
        stage.freeze(self)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures or videos -> media tokens, the connector's output."""
        raise NotImplementedError

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """A prompt with one image token a picture, or a video of `frames` -> with as many places as its media take; here one
        is enough.
        """
        return input_ids, attention_mask

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Token embeddings; families that splice media into the text do it here."""
        return self.lm.embed(input_ids)

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> Any:
        """Prepares what the blocks' neighbours need of the media, once for all layers."""

    def place(
        self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, condition: Any
    ) -> tuple[Tensor, Any]:
        """Tokens at their positions, and what all blocks share of these."""
        text = None if cache is None else cache.text
        positions = self.lm.positions(attention_mask, (x.shape[0], x.shape[1]), text)
        return self.lm.add_positions(x, positions), self.lm.visibility(attention_mask, positions, text)

    def pack(self, condition: Any, packed: PackedPrompts) -> Any:
        """The condition for tokens that stand as one row `[1, N]`; see `PackedPrompts`."""
        return condition

    def block(self, index: int, x: Tensor, seen: Any, cache: KVCache | None) -> Tensor:
        return self.lm.blocks[index](x, seen, cache, index)

    def before_block(self, index: int, x: Tensor, condition: Any) -> Tensor:
        return x

    def after_block(self, index: int, x: Tensor, condition: Any) -> Tensor:
        return x

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
        """One pass over a batch, or over the next tokens of a cached one.

        **Shapes** images `[B, I, 3, H, W]` or, for videos, `[B, I, F, 3, H, W]`; input_ids `[B, T]`; attention_mask bool
        `[B, T]`, each row's tokens one run, padding on either side (only on the left with a cache); labels `[B, T]`, -100 where
        nothing is predicted; media instead of images: what `encode` gave. `last_only` gives the logits of the last position.
        **Gradient** the parameters that `Stage.freeze` leaves trainable. With a cache: none.
        **Edge** no valid label: loss 0.
        **Raises** ValueError for shapes, and on CPU for token ids out of range and padding with holes; TypeError for dtypes.
        """
        if input_ids is None:
            raise ValueError("input_ids: got None, expected token ids [B, T]")
        self._check(input_ids, attention_mask, labels, cache)
        if last_only and labels is not None:
            raise ValueError(
                "last_only: got True beside labels, expected False: the loss needs every position"
            )
        if media is None and images is not None:
            media = self.encode(images)
        text = None if cache is None else cache.text
        if text is not None and text.length == 0 and attention_mask is not None:
            text.start.copy_(attention_mask.to(torch.int8).argmax(1))
        condition = self.condition(input_ids, media, cache)
        x, seen = self.place(self.embed(input_ids, media), attention_mask, cache, condition)
        packed = PackedPrompts.of(attention_mask, text) if self.packs and last_only else None
        if packed is None:
            x = self._blocks(x, seen, text, condition)
            x = x[:, -1:] if last_only else x
        else:
            condition = self.pack(condition, packed)
            x = packed.ends(self._blocks(packed.rows(x), packed.seen(seen), packed, condition))
        if text is not None:
            text.length += input_ids.shape[1]
        logits = self.lm.logits(x)
        loss = None if labels is None else next_token_loss(logits, labels)
        record = getattr(seen, "routings", None)
        routings = () if record is None else tuple(record.kept)
        aux = torch.stack([routing.aux_loss for routing in routings]).sum() if routings else None
        if loss is not None and aux is not None:
            loss = loss + self.balance * aux
        return Output(logits, loss, cache, aux, routings, x)

    def _blocks(self, x: Tensor, seen: Any, cache: KVCache | PackedPrompts | None, condition: Any) -> Tensor:
        run = again(self._around_block) if self.recompute and torch.is_grad_enabled() else self._around_block
        for index in range(len(self.lm.blocks)):
            x = run(index, x, seen, cache, condition)
        return x

    def _around_block(
        self, index: int, x: Tensor, seen: Any, cache: KVCache | PackedPrompts | None, condition: Any
    ) -> Tensor:
        x = self.before_block(index, x, condition)
        x = self.block(index, x, seen, cache)  # type: ignore[arg-type]  # layers append to either
        return self.after_block(index, x, condition)

    def keep_reachable(self, x: Tensor, parts: Sequence[nn.Module], side: int) -> Tensor:
        """In training a batch without images reads a black one, times 0: every rank's graph has the same parameters."""
        learns = self.training and torch.is_grad_enabled()
        if not (learns and any(p.requires_grad for part in parts for p in part.parameters())):
            return x
        nothing = torch.zeros(1, 1, 3, side, side, dtype=x.dtype, device=x.device)
        return x + 0 * self.encode(nothing).mean().to(x.dtype)

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        _check.shapes(input_ids=(ids, "B T"), attention_mask=(mask, "B T"), labels=(labels, "B T"))
        _check.dtypes((torch.int64, torch.int32), input_ids=ids)
        _check.dtypes((torch.bool,), attention_mask=mask)
        _check.dtypes((torch.int64,), labels=labels)
        records = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if cache is not None and records:
            raise ValueError("cache: got one while gradients are recorded, expected torch.no_grad()")
        if ids.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        vocab = self.lm.config.vocab
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
            raise ValueError(
                f"input_ids: got ids {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab - 1}"
            )
        if mask is not None:
            starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0].long()
            if bool((starts > 1).any()):
                raise ValueError(
                    "attention_mask: got a row with a hole, expected one run of tokens in each row"
                )
            if cache is not None and not bool((mask[:, -1]).all()):
                raise ValueError(
                    "attention_mask: got padding on the right, expected it on the left with a cache"
                )

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Room for `capacity` tokens of each of `batch` sequences."""
        return Cache(self.lm.new_cache(batch, capacity))

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        media: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continues prompts token by token, keeping keys and values of text and media.

        Options, with their defaults, are the fields of `models.Decoding`: how tokens are chosen, when a row ends, beams.

        **Shapes** as `forward`; prompts of unequal length are padded on either side, and their padding costs nothing. Returns
        the new ids `[B, N]`, N <= max_new_tokens, rows padded on the right after their end.
        **Edge** each row gives what it would give alone, until one emits a media token: families whose media time then restarts
        say so. **Raises** ValueError for shapes, numbers out of range; TypeError for an option that there is none of.
        """
        if input_ids is None:
            raise ValueError("input_ids: got None, expected token ids [B, T]")
        _check.shapes(input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"))
        _check.positive(tokens=input_ids.shape[1])
        decoding = Decoding(**options)
        ids, mask = pad_left(input_ids, attention_mask, self.tokens.pad)

        def prefill() -> tuple[Tensor, Cache]:
            cache = self.new_cache(ids.shape[0], ids.shape[1] + decoding.max_new_tokens)
            return self(images, ids, mask, media=media, cache=cache, last_only=True).logits[:, -1], cache

        def decode(token: Tensor, cache: Cache) -> Tensor:
            return self(None, token, cache=cache, last_only=True).logits[:, -1]

        ends = (self.tokens.end_of_text, self.tokens.end_of_chunk)
        return decoding.run(prefill, decode, ends, self.tokens.pad)


def fill_places(text: Tensor, place: Tensor, media: Tensor) -> Tensor:
    """Text embeddings `[B, T, C]` with the rows of media `[B, R, C]` where place `[B, T]` is True, in order."""
    index = (place.cumsum(1) - 1).clamp(0, media.shape[1] - 1).unsqueeze(-1).expand_as(text)
    return torch.where(place.unsqueeze(-1), media.to(text.dtype).gather(1, index), text)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of each position's logits `[B, T, V]` against the next label `[B, T]`; 0 without any."""
    # shifting the labels copies less than shifting the logits
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def pad_left(ids: Tensor, mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor | None]:
    """Moves the padding of every row to the left, so that rows go on where they end; None stays None."""
    if mask is None:
        return ids, None
    t = ids.shape[1]
    first = mask.to(torch.int8).argmax(1, keepdim=True)
    count = mask.sum(1, keepdim=True)
    index = torch.arange(t, device=ids.device).expand_as(ids)
    valid = index >= t - count
    source = (index - (t - count) + first).clamp(0, t - 1)
    return torch.where(valid, ids.gather(1, source), pad), valid
