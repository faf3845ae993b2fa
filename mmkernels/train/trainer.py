"""The training loop: deterministic, and resumable at any step.

Every step is a function of the parameters, the optimizer and the step's number: batches are numbered, nothing is drawn that a
checkpoint does not hold. So a run that is killed and started again repeats the steps after its last checkpoint with the same
bits, at the same thread count and versions.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels import data, models
from mmkernels.data import Tokenizer, store
from mmkernels.models import Stage, weights
from mmkernels.train import checkpoint, config
from mmkernels.train.board import Board
from mmkernels.train.config import Run
from mmkernels.train.evaluate import Score, evaluating, last_image
from mmkernels.train.families import family
from mmkernels.train.log import Log, read
from mmkernels.train.objectives import Objectives as Objectives
from mmkernels.train.schedule import learning_rate
from mmkernels.train.throughput import Throughput

HELD_OUT = 512  # documents of the closing evaluation
RESULT = "result.json"


class Diverged(RuntimeError):
    """The loss or its gradient is no number any more."""


@dataclass(frozen=True)
class Result:
    """What a finished run reports: accuracies on held-out documents, and what guessing would give."""

    steps: int
    loss: float
    accuracy: float
    shuffled: float
    chance: float
    documents: int
    captions: dict[str, float]
    seconds: float
    checkpoint: str
    held_out: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # by stage: what the family measures at its end


class Trainer:
    """A run at the step where it stands: at first fresh, after `resume()` where its folder's latest checkpoint left it."""

    def __init__(
        self, run: Run, out: Path, *, device: str = "cpu", save_every: int = 50, recompute: bool = False
    ) -> None:
        self.run, self.out, self.device, self.save_every = run, out, device, save_every
        self.stages = run.stages()
        torch.manual_seed(run.seed)
        dataset = data.build(run.data)
        model: Any = models.build(run.model)
        self.model, self.family = model.to(device), family(model.config)
        texts, words = self.family.texts(dataset, model.config), self.family.words(model.config)
        self.tokenizer = Tokenizer.train(texts, words)
        self.sequences = self.family.sequences(dataset, self.tokenizer, model.config, run.seed)
        self.objectives = self.family.objectives(model, self.sequences, run.batch, device)
        if recompute and not hasattr(model.lm, "blocks"):
            raise ValueError(f"recompute: got it for {run.model}, an encoder-decoder; expected a decoder")
        self.model.recompute = recompute
        self.throughput = Throughput(self.model, device)
        self.step = 0
        self._enter(0)

    def stage_at(self, step: int) -> int:
        """The number of the stage that step `step` (from 0) belongs to; the last one after the end."""
        end = 0
        for index, (_, steps) in enumerate(self.stages):
            end += steps
            if step < end:
                return index
        return len(self.stages) - 1

    def _enter(self, index: int) -> None:
        """Makes the model what the stage trains and gives it an optimizer of its own."""
        self.index = index
        self.stage: Stage = self.stages[index][0]
        self.start = sum(steps for _, steps in self.stages[:index])
        self.model.enter(self.stage)
        self.throughput.begin_stage()
        self.optimizer = torch.optim.AdamW(
            self.objectives.parameters(self.stage), lr=self.stage.learning_rate, betas=self.stage.betas
        )

    def take_step(self) -> dict[str, Any]:
        """One optimizer step, gradients accumulated over the stage's batches; returns its record. **Raises** Diverged."""
        if self.stage_at(self.step) != self.index:
            self._enter(self.stage_at(self.step))
            self.objectives.begin(self.stage)
        number = self.step
        self.throughput.begin_step(partial(self._gradients, number), self.optimizer)
        begun = time.perf_counter()
        rate = learning_rate(self.stage, number - self.start, self.stages[self.index][1])
        losses = self._gradients(number)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.stage.clip).item()
        if not all(map(math.isfinite, (norm, *losses.values()))):
            raise Diverged(self._obituary(losses, norm))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        total = sum(weight * losses[name] for name, weight in self.stage.losses.items())
        seconds = time.perf_counter() - begun
        return {
            "step": self.step, "stage": self.stage.name, "loss": total, "losses": losses, "rate": rate, "norm": norm,
            "seconds": round(seconds, 4), **self.throughput.record(seconds),
        }  # fmt: skip

    def _gradients(self, number: int) -> dict[str, float]:
        """Every loss of a step, its gradients left in the parameters."""
        losses = {}
        for names in self.objectives.passes(self.stage):
            with self._autocast():
                found = self.objectives.losses(names, number, self.stage)
            reduce(add, (self.stage.losses[name] * loss for name, loss in found.items())).backward()
            losses |= {name: loss.item() for name, loss in found.items()}
        return losses

    def _autocast(self) -> AbstractContextManager[object]:
        if self.run.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def _obituary(self, losses: dict[str, float], norm: float) -> str:
        known = store.steps(self.out)
        good = (
            f"the last good checkpoint is {store.checkpoint(self.out, known[-1])}"
            if known
            else "nothing was saved yet"
        )
        worst = ", ".join(f"{name} {loss}" for name, loss in losses.items())
        return f"step {self.step + 1}: the losses are {worst} and the gradient's norm is {norm}; {good}"

    def save(self) -> Path:
        """Writes the checkpoint of this step."""
        tensors = checkpoint.optimizer_tensors(self.optimizer, self._names())
        tensors.update({f"head.{k}": v for k, v in self.objectives.head.state_dict().items()})
        tensors["generator"] = torch.get_rng_state()
        state = {"stage": self.stage.name, "environment": config.environment(self.device)}
        texts = {
            checkpoint.TOKENIZER: self.tokenizer.text(),
            config.RUN: store.to_json(config.describe(self.run)),
        }
        return checkpoint.write(self.out, self.step, state, model=self.model, tensors=tensors, texts=texts)

    def resume(self) -> None:
        """Continues from the latest checkpoint, if there is one. **Raises** ValueError when it is damaged."""
        known = store.steps(self.out)
        if not known:
            return
        folder = store.checkpoint(self.out, known[-1])
        try:
            state = checkpoint.verify(folder)
        except ValueError as error:
            way_out = f"remove {folder} to continue from step {known[-2] if len(known) > 1 else 0}"
            raise ValueError(f"{error}; {way_out}") from None
        if (folder / checkpoint.TOKENIZER).read_text(encoding="utf-8") != self.tokenizer.text():
            raise ValueError(f"{folder}: was trained with other captions or another tokenizer")
        tensors = checkpoint.read_tensors(folder / checkpoint.OPTIMIZER)
        self.step = state["step"]
        self._enter(self.stage_at(self.step - 1))  # the optimizer is that of the step before
        weights.load(self.model, folder / checkpoint.MODEL)
        head = self.objectives.head
        head.load_state_dict({k: tensors.pop(f"head.{k}") for k in head.state_dict()})
        torch.set_rng_state(tensors.pop("generator"))
        checkpoint.restore_optimizer(self.optimizer, self._names(), tensors)
        self._compare(state["environment"])

    def _names(self) -> dict[Tensor, str]:
        both = {"": self.model, "head.": self.objectives.head}
        return {p: prefix + name for prefix, part in both.items() for name, p in part.named_parameters()}

    def _compare(self, before: dict[str, Any]) -> None:
        now = config.environment(self.device)
        changed = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]
        if changed:
            warnings.warn(f"the curve continues, but not bit for bit: {'; '.join(changed)}", stacklevel=2)

    def score(self, documents: int, *, shuffled: bool = False) -> Score:
        with self._autocast(), evaluating(self.model):
            hits = self.objectives.hits
            return last_image(self.model, self.sequences, documents, shuffled=shuffled, hits=hits)

    def measure(self) -> dict[str, Any]:
        """What the family measures where a stage ends; nothing elsewhere."""
        if self.step - self.start < self.stages[self.index][1]:
            return {}
        with self._autocast():
            return self.family.measure(self.model, self.sequences, self.stage)


def train(
    run: Run,
    out: Path,
    *,
    resume: str = "auto",
    device: str = "cpu",
    save_every: int = 50,
    recompute: bool = False,
    tensorboard: bool = False,
    observe: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Result:
    """Trains a run in the folder `out` from where it stands to its end, and evaluates it on held-out documents.

    `observe` is called with every step's record, as `log.jsonl` keeps it; `tensorboard` writes it for TensorBoard too.
    `recompute` keeps less for the backward pass (`models.recompute`); the numbers stay the same bits.
    **Raises** ValueError for a folder that is another run's, or a damaged checkpoint; Diverged, naming the last good one.
    """
    config.check_folder(run, out, resume)
    trainer = Trainer(run, out, device=device, save_every=save_every, recompute=recompute)
    config.claim(run, out)
    with store.locked(out):
        store.tidy(out, checkpoint.KEEP)
        trainer.resume()
        logs = [Log(out, trainer.step), *([Board(out, trainer.step)] if tensorboard else [])]
        try:
            _loop(trainer, logs, observe)
        finally:
            for log in logs:
                log.close()
        result = _evaluate(trainer)
        store.write(out / RESULT, store.to_json(asdict(result)))
    return result


def _loop(trainer: Trainer, logs: list[Log | Board], observe: Callable[[dict[str, Any]], None]) -> None:
    total = trainer.run.total()
    while trainer.step < total:
        record = trainer.take_step()
        measured = trainer.measure()
        if measured:
            record["held_out"] = measured
        for log in logs:
            log.append(record)
        observe(record)
        if trainer.step % trainer.save_every == 0 or trainer.step == total:
            for log in logs:
                log.flush()
            trainer.save()


def _evaluate(trainer: Trainer) -> Result:
    records = read(trainer.out)
    score, shuffled = trainer.score(HELD_OUT), trainer.score(HELD_OUT, shuffled=True)
    return Result(
        steps=trainer.step,
        loss=records[-1]["loss"],
        accuracy=score.accuracy,
        shuffled=shuffled.accuracy,
        chance=1 / len(trainer.sequences.dataset.captions),
        documents=score.total,
        captions={caption: right / total for caption, (right, total) in sorted(score.captions.items())},
        seconds=round(sum(record["seconds"] for record in records), 1),
        checkpoint=str(store.checkpoint(trainer.out, trainer.step)),
        held_out={record["stage"]: record["held_out"] for record in records if "held_out" in record},
    )
