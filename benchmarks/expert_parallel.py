"""A model with experts on several ranks: is a step what one process computes, and how many bytes travel?

`torchrun --nproc-per-node 2 -m benchmarks.expert_parallel` trains the last stage of moe_llava-tiny for some steps on random
pictures and words, every rank on rows of its own (the last one on half as many), experts apart and the rest under FSDP2. Rank 0
does the same with the whole model, rank after rank, and compares every parameter.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mmkernels import models
from mmkernels.layers import MoE, expert_parallel
from mmkernels.train.parallel import clip_gradients, local, parallelize, whole_state

_RATE, _CLIP = 0.05, 1.0


def rows(model: Any, rank: int, ranks: int, batch: int, step: int) -> dict[str, Tensor]:
    """The batch of a rank in a step; the last rank has half as many rows."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    count = batch if rank < ranks - 1 else max(1, batch // 2)
    prompts = torch.randint(4, model.config.lm.vocab - 4, (count, 12), generator=generator)
    prompts[:, 0] = model.tokens.image
    ids, mask = model.expand(prompts)
    side = model.config.vision.image_size
    pixels = torch.randn(count, 1, 3, side, side, generator=generator)
    return {"images": pixels, "input_ids": ids, "attention_mask": mask, "labels": ids}


def step_of(model: Any, batches: list[dict[str, Tensor]], mesh: Any = None) -> float:
    """One step of SGD on the mean of the batches' losses, which it returns."""
    learns = [p for p in model.parameters() if p.requires_grad]
    total = 0.0
    for batch in batches:
        output = model(**batch)
        (output.loss / len(batches)).backward()
        total += float(output.loss.detach()) / len(batches)
    if mesh is None:
        torch.nn.utils.clip_grad_norm_(learns, _CLIP)
    else:
        clip_gradients(learns, _CLIP, mesh)
    optimizer = torch.optim.SGD(learns, lr=_RATE)
    optimizer.step()
    optimizer.zero_grad()
    return total


class Wire:
    """Counts the bytes of rows that this rank sends to others."""

    def __init__(self) -> None:
        self.bytes, self._send = 0, expert_parallel._all_to_all
        expert_parallel._all_to_all = self

    def __call__(
        self, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        away = sum(sent) - sent[dist.get_rank(group)]
        self.bytes += away * rows[0:1].numel() * rows.element_size() if len(rows) else 0
        return self._send(rows, sent, received, group)


def even(tokens: int, k: int, width: int, ranks: int, *, size: int = 4) -> float:
    """Bytes that a rank sends in one layer, forward and backward, when routes fall evenly on the ranks and none is dropped."""
    return 4 * tokens * k * width * size * (ranks - 1) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="moe_llava-tiny")
    parser.add_argument("--batch", type=int, default=8, help="rows of a rank (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    one: Any = models.build(options.model)
    one.enter(one.stages()[-1])
    spread = copy.deepcopy(one)
    parallelize(spread, mesh)
    wire, seconds, losses, tokens = Wire(), [], [], 0
    for step in range(options.steps):
        batch = rows(one, rank, ranks, options.batch, step)
        dist.barrier()
        begun = time.perf_counter()
        loss = step_of(spread, [batch], mesh)
        seconds.append(time.perf_counter() - begun)
        tokens = batch["input_ids"].numel()
        losses.append(loss)
    moes = sum(isinstance(part, MoE) for part in spread.modules())
    sent = wire.bytes // options.steps
    formula = moes * even(tokens, one.config.experts.top_k, one.config.lm.block.width, ranks)
    state = whole_state(spread, mesh)
    if rank == 0:
        for step in range(options.steps):
            step_of(one, [rows(one, r, ranks, options.batch, step) for r in range(ranks)])
        worst = max(float((state[n] - p.detach()).abs().max()) for n, p in one.named_parameters())
        print(json.dumps({
            "ranks": ranks, "experts": one.config.experts.experts, "moe_layers": moes,
            "parameters": sum(p.numel() for p in one.parameters()),
            "parameters_here": sum(local(p).numel() for p in spread.parameters()),
            "loss_of_rank_0": [round(loss, 4) for loss in losses],
            "largest_difference": worst, "bytes_sent_a_step": sent, "evenly": round(formula),
            "median_step_ms": round(1e3 * sorted(seconds)[len(seconds) // 2], 1),
        }))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
