"""Whole models: a training step with kernels against the same step on the reference, both on the same real batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import machine, measure
from benchmarks.wanted import MODELS, Row, Wanted
from mmkernels import data, models, using
from mmkernels.data import Sequences, Tokenizer
from mmkernels.models import Flamingo
from mmkernels.primitives._op import OPS
from mmkernels.train.objectives import Objectives

BATCH, CURVE = 16, 3  # documents of a step; steps over which the loss curves are compared
STEPS = {"flamingo-tiny": "digits"}  # model: its real data


def plan(wanted: Wanted) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    return [
        (f"{model} step", lambda m=model, d=source: _step(m, d, wanted))
        for model, source in STEPS.items()
        if (not wanted.ops or MODELS in wanted.ops)
        and (not wanted.shapes or f"{model}-step" in wanted.shapes)
        and (not wanted.dtypes or "float32" in wanted.dtypes)
        and (not wanted.passes or "fwd+bwd" in wanted.passes)
    ]


class Training:
    """The last stage of a model's recipe, from nothing; every step on its own numbered batch."""

    def __init__(self, name: str, source: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        dataset, model = data.build(source), models.build(name)
        assert isinstance(model, Flamingo)  # the one family there is
        model = model.to(device, dtype)
        tokenizer = Tokenizer.train(dataset.captions, model.config.lm.vocab)
        sequences = Sequences(dataset, tokenizer, model.config.vision.image_size, seed=0)
        self.stage = model.stages()[-1]
        self.stage.freeze(model)
        self.objectives = Objectives(model, sequences, BATCH, device)
        self.optimizer = torch.optim.AdamW(
            self.objectives.parameters(self.stage), lr=self.stage.learning_rate
        )
        self.number = 0

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        total = 0.0
        for name, weight in self.stage.losses.items():
            loss = self.objectives.loss(name, self.number, self.stage)
            (weight * loss).backward()
            total += weight * loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        return total


def _step(name: str, source: str, wanted: Wanted) -> Iterator[Row]:
    row: Row = {
        "op": MODELS,
        "shape": f"{name}-step",
        "dtype": "float32",
        "headline": True,
        "pass": "fwd+bwd",
        "backend": _best(wanted.device),
        **judge(name, source, wanted.device),
    }
    if row["correct"]:
        row |= _timed(name, source, wanted)
    gc.collect()
    yield row


def judge(name: str, source: str, device: str) -> Row:
    """The accuracy rule on the loss curve: distance to float64, at most twice the reference's own and a few roundings."""
    ours = _curve(Training(name, source, device))
    with using("reference"):
        plain = _curve(Training(name, source, device))
        exact = _curve(Training(name, source, device, torch.float64))
    error, allowed = (max(abs(a - b) for a, b in zip(curve, exact, strict=True)) for curve in (ours, plain))
    allowed = 2 * allowed + CURVE * torch.finfo(torch.float32).eps * max(exact)
    return {
        "correct": error <= allowed,
        "share_of_allowed_error": measure.significant(error / allowed, 3),
        "worst": "loss",
    }


def _curve(training: Training) -> list[float]:
    return [training.step() for _ in range(CURVE)]


def _best(device: str) -> str:
    """The backend of the op that the model is about."""
    return next(row.backend for row in OPS["gated_cross_attention"].rows[device] if not row.present())


def _timed(name: str, source: str, wanted: Wanted) -> Row:
    """Ours and the reference each train a model of their own, in turn."""
    trainings = {who: Training(name, source, wanted.device) for who in ("ours", "reference", "again")}

    def on_reference() -> float:
        with using("reference"):
            return trainings["reference"].step()

    functions: dict[str, Callable[[], Any]] = {
        "ours": trainings["ours"].step,
        "reference": on_reference,
        "again": trainings["again"].step,
    }
    for function in functions.values():
        function()
    neighbours = machine.Neighbours()
    clock = measure.clock(wanted.device)
    times = measure.interleave(functions, clock, seconds=2 * wanted.seconds, rounds=20)
    others, found = neighbours.cores(), measure.ratio(times, "reference", "ours")
    return {
        "ms": measure.spread(times, "ours").rounded(),
        "ratio": {"reference": measure.significant(found.median)},
        "ratio_p20": {"reference": measure.significant(found.p20)},
        "ratio_p80": {"reference": measure.significant(found.p80)},
        "peer_ms": {"reference": measure.spread(times, "reference").rounded()},
        "itself": measure.ratio(times, "again", "ours").rounded(),
        "absent": {},
        "others_cores": others,
        "loaded": others is not None and others > machine.BUSY,
    }
