"""Beam search: the likeliest of several continuations that are kept side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[["Tensor | None", "Tensor | None"], Tensor]


class Beam(NamedTuple):
    """A continuation: the sum of its log-probabilities, its ids, and the beam that it prolongs."""

    total: float
    ids: tuple[int, ...]
    parent: int = 0


@dataclass
class Search:
    """One prompt's: the beams that go on, and the best `beams` answers that have ended, with their scores."""

    beams: int
    length_penalty: float
    going: list[Beam] = field(default_factory=lambda: [Beam(0.0, ())])
    answers: list[tuple[float, Beam]] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: list[Beam], stop: Sequence[int], last: bool) -> None:
        """Takes the next step's candidates, the likeliest first. Nothing changes any more once the search is done."""
        if self.done:
            return
        ends = [last or beam.ids[-1] in stop for beam in candidates]
        for beam, end in zip(candidates[: self.beams], ends, strict=False):
            if end and beam.total > -math.inf:
                self.answers.append((beam.total / len(beam.ids) ** self.length_penalty, beam))
        self.answers = sorted(self.answers, key=lambda answer: -answer[0])[: self.beams]
        going = [beam for beam, end in zip(candidates, ends, strict=True) if not end][: self.beams]
        never = (going or candidates)[0]._replace(
            total=-math.inf
        )  # where there are fewer candidates than beams
        self.going = going + [never] * (self.beams - len(going))
        attainable = self.going[0].total / len(never.ids) ** self.length_penalty
        self.done = len(self.answers) == self.beams and attainable <= self.answers[-1][0]


def beam_search(
    step: Step, beams: int, limit: int, stop: Sequence[int], pad: int, *, length_penalty: float = 1.0
) -> Tensor:
    """New ids `[B, N]`, N <= limit: of each prompt the answer with the greatest sum of log-probabilities / length ^ penalty.

    `step(None, None)` gives the logits `[B, V]` after the prompts; `step(token [B * beams, 1], rows [B * beams])` those after
    the tokens, where sequence n goes on from what was sequence `rows[n]` (at first: prompt `rows[n]`). Every step takes each
    prompt's `(1 + |stop|) * beams` likeliest continuations: those that end are answers if they are among the first `beams`, of
    the others the first `beams` go on. A prompt is done when none of these, at its present length, would beat its answers. At
    the limit everything ends. Lengths count the ending token. **Edge** equal scores keep the order of beams, then of ids.
    """
    logits = step(None, None)
    batch, vocab, device = *logits.shape, logits.device
    searches = [Search(beams, length_penalty) for _ in range(batch)]
    for length in range(1, limit + 1):
        totals = torch.tensor([[beam.total for beam in search.going] for search in searches], device=device)
        scores = totals.unsqueeze(2) + logits.float().log_softmax(-1).view(batch, -1, vocab)
        best = scores.flatten(1).topk(min((1 + len(stop)) * beams, scores[0].numel()))
        for search, values, places in zip(searches, *(found.tolist() for found in best), strict=True):
            found = [(value, *divmod(place, vocab)) for value, place in zip(values, places, strict=True)]
            candidates = [Beam(value, (*search.going[n].ids, token), n) for value, n, token in found]
            search.advance(candidates, stop, length == limit)
        if length == limit or all(search.done for search in searches):
            break
        width = totals.shape[1]
        going = [(n * width + beam.parent, beam.ids[-1]) for n, s in enumerate(searches) for beam in s.going]
        rows, token = torch.tensor(going, device=device).unbind(1)
        logits = step(token.unsqueeze(1), rows)
    return _as_rows([search.answers[0][1].ids for search in searches], pad, device)


def _as_rows(answers: list[tuple[int, ...]], pad: int, device: torch.device) -> Tensor:
    longest = max(map(len, answers))
    return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in answers], device=device)
