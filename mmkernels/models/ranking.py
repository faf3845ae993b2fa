"""Choosing among given answers by their likelihood: classification and multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.base import IGNORE
from mmkernels.models.qformer_batches import instruction_batch
from mmkernels.primitives import _check


class Ranking(NamedTuple):
    """losses `[B, C]` of the candidates, and their numbers from the likeliest on, `order` `[B, C]`."""

    losses: Tensor
    order: Tensor


@torch.no_grad()
def rank_candidates(
    model: Any,
    images: Tensor | None,
    prompt_ids: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    prompt_mask: Tensor | None = None,
    instruction: Any = None,
    media: Tensor | None = None,
    n_segments: int = 1,
) -> Ranking:
    """Ranks every candidate as the answer to each prompt, by the negative log-likelihood of its tokens alone.

    A decoder's loss is the sum over the candidate's tokens (no end of text), divided by `padded length - 1` of its segment's
    batch, as published: within one segment the order is that of the sums, across segments of unequal padding it need not be. An
    encoder-decoder's is the plain sum, end of text included; its encoder runs once. Neither divides by the candidate's own
    length: short candidates are favoured.

    **Shapes** images as `model.encode` takes them, or `media`; prompt_ids `[B, T]`, places for media included; candidates are C
    lists of ids without BOS or end. They run in `n_segments` parts of `C // n_segments`, the last one taking what remains.
    **Edge** equal losses keep the candidates' order. **Raises** ValueError for no or empty candidates and for n_segments.
    **Source** InstructBLIP (arXiv 2305.06500) and its code.
    """
    _check.shapes(prompt_ids=(prompt_ids, "B T"), prompt_mask=(prompt_mask, "B T"))
    count = len(candidates)
    if not count or not all(len(c) for c in candidates):
        raise ValueError(f"candidates: got {count}, expected one or more, each with a token or more")
    if not 1 <= n_segments <= count:
        raise ValueError(f"n_segments: got {n_segments}, expected 1 to {count}, the number of candidates")
    mask = torch.ones_like(prompt_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask
    if media is None and images is not None:
        media = model.encode(images, instruction)
    encoder_decoder = hasattr(model.lm, "encode")
    score = _answers if encoder_decoder else _continuations
    prompt = (prompt_ids, mask)
    if encoder_decoder:
        prompt = (model.lm.encode(model.embed(prompt_ids, media), mask), mask)
        candidates = [[*c, model.tokens.end_of_text] for c in candidates]
    size = count // n_segments
    ends = [*(size * n for n in range(1, n_segments)), count]
    parts = [
        score(model, prompt, media, candidates[start:end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    losses = torch.cat(parts, 1)
    return Ranking(losses, losses.argsort(dim=1, stable=True))


def _padded(candidates: Sequence[Sequence[int]], batch: int, like: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """ids and mask `[batch * C, longest]`, the candidates tiled: batch-major, candidate-minor."""
    ids = torch.full((len(candidates), max(map(len, candidates))), pad, device=like.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for n, candidate in enumerate(candidates):
        ids[n, : len(candidate)] = torch.tensor(candidate, device=like.device)
        mask[n, : len(candidate)] = True
    return ids.repeat(batch, 1), mask.repeat(batch, 1)


def _continuations(
    model: Any, prompt: tuple[Tensor, Tensor], media: Tensor | None, candidates: Sequence[Sequence[int]]
) -> Tensor:
    """`[B, C]`: summed losses over (padded length - 1)."""
    (ids, mask), c = prompt, len(candidates)
    answers = _padded(candidates, len(ids), ids, model.tokens.pad)
    rows, valid = ids.repeat_interleave(c, 0), mask.repeat_interleave(c, 0)
    joined, seen, labels = instruction_batch(rows, valid, *answers, model.tokens.pad)
    each = None if media is None else media.repeat_interleave(c, 0)
    logits = model(input_ids=joined, attention_mask=seen, media=each).logits
    return _sums(logits[:, :-1], labels[:, 1:]).view(len(ids), c) / (joined.shape[1] - 1)


def _answers(
    model: Any, prompt: tuple[Tensor, Tensor], media: Tensor | None, candidates: Sequence[Sequence[int]]
) -> Tensor:
    """`[B, C]`: summed losses of what the decoder writes; the encoder's states are `prompt[0]`."""
    (states, mask), c = prompt, len(candidates)
    ids, valid = _padded(candidates, len(states), mask, model.tokens.pad)
    begun = F.pad(ids[:, :-1], (1, 0), value=model.tokens.pad)
    logits = model.lm.decode(begun, states.repeat_interleave(c, 0), mask.repeat_interleave(c, 0))
    return _sums(logits, torch.where(valid, ids, IGNORE)).view(len(states), c)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's summed cross-entropy, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(labels.shape).sum(1)
