"""How an answer is decoded: one token after the other, by sampling or by beams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.beams import beam_search
from mmkernels.models.sampling import Sampler, continue_text
from mmkernels.primitives import _check


@dataclass(frozen=True)
class Decoding:
    """`temperature=0` takes the likeliest token; otherwise tokens are drawn from the `top_k` likeliest, and of those from the
    fewest that together have probability `top_p`. A row ends at a token of `stop` (end of text and end of chunk unless given),
    which is part of the answer. `on_token` hears the ids `[B]` of every step as soon as they are chosen.

    `beams` above 1 search for the answer with the greatest sum of log-probabilities / length ^ `length_penalty` instead.
    **Raises** ValueError for numbers out of range, and for beams beside a temperature or `on_token`.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[int] | None = None
    generator: torch.Generator | None = None
    on_token: Callable[[Tensor], object] | None = None
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check.positive(max_new_tokens=self.max_new_tokens, beams=self.beams)
        if self.beams > 1 and (self.temperature or self.on_token is not None):
            rival = "a temperature" if self.temperature else "on_token"
            raise ValueError(
                f"beams: got {self.beams} beside {rival}, expected 1: a search ends before it can tell"
            )

    def run(
        self,
        prefill: Callable[[], tuple[Tensor, Any]],
        decode: Callable[[Tensor, Any], Tensor],
        ends: Sequence[int],
        pad: int,
    ) -> Tensor:
        """New ids `[B, N]`. `prefill()` gives the logits `[B, V]` after the prompts and a cache with a `select(rows)`;
        `decode(token [B, 1], cache)` the logits after the next tokens.
        """
        stop = tuple(ends if self.stop is None else self.stop)
        cache: Any = None

        def step(token: Tensor | None, rows: Tensor | None = None) -> Tensor:
            nonlocal cache
            if token is None:
                logits, cache = prefill()
                return logits
            if rows is not None and not _in_place(rows):
                cache = cache.select(rows)
            return decode(token, cache)

        if self.beams > 1:
            return beam_search(
                step, self.beams, self.max_new_tokens, stop, pad, length_penalty=self.length_penalty
            )
        sampler = Sampler(self.temperature, self.top_k, self.top_p, self.generator)
        return continue_text(step, sampler, self.max_new_tokens, stop, pad, self.on_token)


def _in_place(rows: Tensor) -> bool:
    """Whether every beam goes on where it is; never so after the prompts, each of which goes on as several."""
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))
