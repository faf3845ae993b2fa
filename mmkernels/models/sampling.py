"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Sampler:
    """The likeliest token at temperature 0, else a draw; see `MultimodalModel.generate`."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: got {temperature}, expected 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected 1 or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p}, expected 0 < p <= 1")
        self.temperature, self.top_k, self.top_p, self.generator = temperature, top_k, top_p, generator

    def __call__(self, logits: Tensor) -> Tensor:
        """`[B, V]` -> `[B]`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p is not None:
            ordered, index = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # what the likelier tokens already have
            probabilities = torch.zeros_like(ordered).scatter_(
                -1, index, ordered.masked_fill(before >= self.top_p, 0)
            )
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)


def continue_text(
    step: Callable[[Tensor | None], Tensor],
    sampler: Sampler,
    limit: int,
    stop: Sequence[int],
    pad: int,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """New ids `[B, N]`, N <= limit: a row ends at a token of `stop`, which is part of it, and goes on with `pad`.

    `step(token [B, 1])` gives the logits `[B, V]` that follow the token; its first call, with None, those after the prompt.
    `on_token` hears every step's ids `[B]` as soon as they are chosen.
    """
    answer: list[Tensor] = []
    token, done = None, None
    for _ in range(limit):
        logits = step(token)
        chosen = sampler(logits)
        done = torch.zeros_like(chosen, dtype=torch.bool) if done is None else done
        chosen = torch.where(done, pad, chosen)
        answer.append(chosen)
        if on_token is not None:
            on_token(chosen)
        for end in stop:
            done = done | (chosen == end)
        if bool(done.all()):
            break
        token = chosen.unsqueeze(1)
    return torch.stack(answer, dim=1)
