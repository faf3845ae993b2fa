"""What a training step of a preset would cost on many GPUs: time, tokens a second, memory and bytes over the wire.

FLOPs and activations are counted on the model itself, on meta; the rest is arithmetic with published rates. A prediction is a
bound with one free number, the share of the peak that products reach; it knows no imbalance and no stalls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mmkernels import models
from mmkernels.models import Stage
from mmkernels.train.flops import Work, count


class Machine(NamedTuple):
    """One GPU by its data sheet: dense bfloat16 FLOP/s, bytes of memory, bytes a second of memory, of its links to the
    others of its node, and to other nodes (one 400 Gbit/s or 800 Gbit/s port a GPU), each in one direction; GPUs a node.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    node: int = 8


GPUS = {
    "a100": Machine(312e12, 80e9, 2.0e12, 300e9, 25e9),
    "h100": Machine(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Machine(2250e12, 180e9, 8.0e12, 900e9, 50e9),
}


_FIXED = (
    models.Flamingo, models.Blip2, models.CogVLM, models.Lavin, models.Llava, models.MoeLlava, models.NextGpt, models.QwenVL,
)  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """What is asked: a preset's stage on `gpus`, with `batch` documents a GPU, each of so many pictures and words."""

    model: str
    gpus: int = 8
    gpu: str = "h200"
    batch: int = 1
    images: int = 1
    words: int = 512
    stage: str | None = None
    efficiency: float = 0.5

    def __post_init__(self) -> None:
        for name, value, least in (
            ("gpus", self.gpus, 1), ("batch", self.batch, 1), ("images", self.images, 0), ("words", self.words, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: got {value}, expected {least} or more")
        if self.gpu not in GPUS:
            raise ValueError(f"gpu: got {self.gpu!r}, expected one of {', '.join(GPUS)}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency: got {self.efficiency}, expected 0 < share <= 1")

    def machine(self) -> Machine:
        return GPUS[self.gpu]


class Plan(NamedTuple):
    """A prediction; times in seconds, sizes in bytes, both a GPU and step. `fits` says whether the memory is there."""

    stage: str
    parameters: int
    trainable: int
    tokens: int
    flops: float
    compute_seconds: float
    wire_seconds: float
    step_seconds: float
    tokens_per_second: float
    state_bytes: float
    activation_bytes: float
    wire_bytes: float
    fits: bool


def plan(wish: Wish) -> Plan:
    """Predicts a step. **Raises** ValueError for a preset, stage or number that there is none of."""
    with torch.device("meta"):
        model: Any = models.build(wish.model, dtype=torch.bfloat16).train()
    stage = _stage(model.stages(), wish)
    stage.freeze(model)
    batch = document(model, stage, wish.images, wish.words)
    work, tokens = count(model, batch), batch["input_ids"].numel()
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return predict(wish, work, (stage.name, tokens, total, trainable))


def predict(wish: Wish, work: Work, about: tuple[str, int, int, int]) -> Plan:
    """The arithmetic: `about` is the stage's name, tokens of a document, parameters and trainable ones.

    Everything is sharded (FSDP2): a GPU holds 1 / gpus of bfloat16 weights, and of float32 masters, gradients and two moments
    of what is trained; it receives all weights twice a step, and sends the gradients of what is trained once. Transfers hide
    behind products, so a step takes the longer of the two.
    """
    name, tokens, total, trainable = about
    machine, n = wish.machine(), wish.gpus
    flops = wish.batch * work.total
    share = (n - 1) / n
    wire = share * (2 * 2 * total + 4 * trainable)
    link = machine.link if n <= machine.node else machine.network
    compute, transfer = flops / (machine.flops * wish.efficiency), wire / link
    step = max(compute, transfer)
    largest = 2 * total / 32  # one block's weights are gathered at a time, and the next one's beside them
    state = (2 * total + 16 * trainable) / n + 2 * largest * (n > 1)
    activations = wish.batch * work.kept
    return Plan(
        name, total, trainable, tokens, flops, compute, transfer, step, n * wish.batch * tokens / step, state,
        activations, wire, state + activations <= machine.memory,
    )  # fmt: skip


def _stage(stages: list[Stage], wish: Wish) -> Stage:
    if wish.stage is None:
        return stages[-1]
    found = [stage for stage in stages if stage.name == wish.stage]
    if not found:
        raise ValueError(
            f"stage: got {wish.stage!r}, expected one of {', '.join(stage.name for stage in stages)}"
        )
    return found[0]


def document(model: Any, stage: Stage, images: int, words: int) -> dict[str, Any]:
    """`forward`'s arguments for one document, pictures before words, on meta. **Raises** ValueError for a family whose
    pictures have no fixed number of tokens.
    """
    config, tokens = model.config, model.tokens
    if not hasattr(config, "vision") or not isinstance(model, _FIXED):
        raise ValueError(
            f"model: {type(model).__name__} has pictures of any size; its plan is not a preset's"
        )
    ids = torch.full((1, images + words), max(tokens.pad, tokens.end_of_text, 4) + 1, dtype=torch.int64)
    ids[:, :images] = tokens.image
    ids = model.expand(ids)[0]
    side = stage.image_size or config.vision.image_size
    given: dict[str, Any] = {"input_ids": ids.to("meta"), "labels": torch.empty_like(ids, device="meta")}
    if images:
        given["images"] = torch.empty(1, images, 3, side, side, dtype=torch.bfloat16, device="meta")
    return given
