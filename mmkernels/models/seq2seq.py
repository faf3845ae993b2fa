"""Training and answering with an encoder-decoder language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.layers.t5 import T5, T5Cache
from mmkernels.models.base import IGNORE
from mmkernels.models.decoding import Decoding


def decoder_inputs(labels: Tensor, start: int = 0) -> Tensor:
    """What the decoder reads to predict `labels` `[B, T]`: them, one later, behind `start`; -100 becomes `start` too."""
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORE, start)


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits `[B, T, V]` against labels `[B, T]` at their own places; 0 without any."""
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


@torch.no_grad()
def generate(
    lm: T5,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    *,
    stop: Sequence[int] = (1,),
    start: int = 0,
    pad: int = 0,
    **options: Any,
) -> Tensor:
    """Answers to embeddings `[B, S, C]` token by token: new ids `[B, N]`, N <= max_new_tokens, without the start token.

    The encoder runs once; options are those of `models.Decoding`. The ids are FlanT5's unless given.
    **Edge** each row gives what it would give alone. **Raises** ValueError for shapes and numbers out of range.
    """
    decoding = Decoding(**options)
    states = lm.encode(inputs_embeds, attention_mask)

    def prefill() -> tuple[Tensor, T5Cache]:
        cache = lm.new_cache(states.shape[0], decoding.max_new_tokens)
        first = torch.full((states.shape[0], 1), start, device=states.device)
        return lm.decode(first, states, attention_mask, cache)[:, -1], cache

    def decode(token: Tensor, cache: T5Cache) -> Tensor:
        return lm.decode(token, None, cache=cache)[:, -1]

    return decoding.run(prefill, decode, stop, pad)
