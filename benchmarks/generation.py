"""Generation: prompts of unequal length without their padding, and tokens that do not encode their pictures again.

The model is a Flamingo of 34 million parameters: large enough that products, not calls, take the time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.wanted import GENERATION, MODELS, Row, Wanted
from mmkernels import models
from mmkernels.models import Flamingo

BATCH, SHORTEST, LONGEST, NEW = 8, 64, 256, 16  # prompts, evenly spread in length, and tokens that each gets


def plan(wanted: Wanted) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    makers = dict(zip(GENERATION, (_prefill, _generate, _decode), strict=True))
    return [
        (name, lambda n=name, make=make: _row(n, make, wanted))
        for name, make in makers.items()
        if (not wanted.ops or MODELS in wanted.ops)
        and (not wanted.shapes or name in wanted.shapes)
        and (not wanted.dtypes or "float32" in wanted.dtypes)
        and (not wanted.passes or "fwd" in wanted.passes)
    ]


def model(device: str) -> Flamingo:
    torch.manual_seed(0)
    tiny: Any = models.config("flamingo-tiny")
    block = replace(tiny.lm.block, width=512, heads=8, hidden=2048)
    vision = replace(tiny.vision, image_size=112, width=256, layers=4, hidden=1024)
    config = replace(tiny, lm=replace(tiny.lm, block=block, layers=8), vision=vision)
    built: Any = models.build(config, device=device)
    return built.eval().requires_grad_(False)


def prompts(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, ids and mask: one picture before each text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 500, (BATCH, LONGEST), generator=generator)
    length = torch.linspace(SHORTEST, LONGEST, BATCH).long().unsqueeze(1)
    mask = torch.arange(LONGEST) >= LONGEST - length
    ids = torch.where(mask, ids, 0).scatter_(1, LONGEST - length, 2)
    images = torch.randn(BATCH, 1, 3, 112, 112, generator=generator)
    return images.to(device), ids.to(device), mask.to(device)


Pair = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]


def _prefill(device: str) -> Pair:
    return _against_padded(device, 1)


def _generate(device: str) -> Pair:
    return _against_padded(device, NEW)


def _against_padded(device: str, new: int) -> Pair:
    packed, padded, given = model(device), model(device), prompts(device)
    padded.packs = False
    run = [lambda m=m: m.generate(*given, max_new_tokens=new, stop=()) for m in (packed, padded)]
    return "padded", run[0], run[1]


def _decode(device: str) -> Pair:
    """Tokens after the prompt, one call each, with the cache's media or with pictures encoded again for every token."""
    flamingo = model(device)
    images, ids, mask = prompts(device)
    token = torch.full((BATCH, 1), 7, device=device)

    @torch.no_grad()
    def run(again: bool) -> Tensor:
        cache.text.length, cache.media["condition"] = LONGEST, kept
        for _ in range(NEW):
            if again:
                fresh = flamingo.condition(ids, flamingo.encode(images), None)
                cache.media["condition"] = kept._replace(keys_values=fresh.keys_values)
            out = flamingo(None, token, cache=cache, last_only=True).logits
        return out

    cache = flamingo.new_cache(BATCH, LONGEST + NEW)
    with torch.no_grad():
        flamingo(images, ids, mask, cache=cache, last_only=True)
    kept = cache.media["condition"]
    return "recomputed", lambda: run(False), lambda: run(True)


def _row(name: str, make: Callable[[str], Pair], wanted: Wanted) -> Iterator[Row]:
    peer, ours, theirs = make(wanted.device)
    mine, yours = ours(), theirs()
    same = (
        torch.equal(mine, yours) if not mine.is_floating_point() else torch.allclose(mine, yours, atol=1e-4)
    )
    row: Row = {
        "op": MODELS, "shape": name, "dtype": "float32", "headline": True, "pass": "fwd", "backend": "composed",
        "correct": same, "share_of_allowed_error": 0.0 if same else 2.0, "worst": "answer",
    }  # fmt: skip
    if same:
        row |= _timed({"ours": ours, peer: theirs, "again": ours}, peer, wanted)
    gc.collect()
    yield row


def _timed(functions: dict[str, measure.Function], peer: str, wanted: Wanted) -> Row:
    neighbours, clock = machine.Neighbours(), measure.clock(wanted.device)
    times = measure.interleave(functions, clock, seconds=2 * wanted.seconds, rounds=20)
    others, found = neighbours.cores(), measure.ratio(times, peer, "ours")
    return {
        "ms": measure.spread(times, "ours").rounded(),
        "ratio": {peer: measure.significant(found.median)},
        "ratio_p20": {peer: measure.significant(found.p20)},
        "ratio_p80": {peer: measure.significant(found.p80)},
        "peer_ms": {peer: measure.spread(times, peer).rounded()},
        "itself": measure.ratio(times, "again", "ours").rounded(),
        "absent": {},
        "others_cores": others,
        "loaded": others is not None and others > machine.BUSY,
    }
