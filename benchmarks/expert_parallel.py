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
from mmkernels.layers import MoE
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


def step_of(model: Any, batches: list[dict[str, Tensor]], mesh: Any = None) -> tuple[float, Any]:
    """One step of SGD on the mean of the batches' losses; the loss, and the last pass' output."""
    learns = [p for p in model.parameters() if p.requires_grad]
    total, output = 0.0, None
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
    return total, output


def sent(output: Any, width: int, rank: int, ranks: int) -> int:
    """Bytes that a rank sends in a step for its tokens and their gradients: each row goes out, and its gradient too; as many
    rows come back to others from here as they sent, which their own figures count.
    """
    away = 0
    for routing in output.routings:
        there = routing.counts.view(ranks, -1).sum(1)
        away += int(there.sum() - there[rank])
    return 4 * away * width * 4  # out and back, forward and backward, float32


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
    bytes_sent, seconds, losses = 0, [], []
    for step in range(options.steps):
        batch = rows(one, rank, ranks, options.batch, step)
        dist.barrier()
        begun = time.perf_counter()
        loss, output = step_of(spread, [batch], mesh)
        seconds.append(time.perf_counter() - begun)
        bytes_sent += sent(output, one.config.lm.block.width, rank, ranks)
        losses.append(loss)
    state = whole_state(spread, mesh)
    if rank == 0:
        for step in range(options.steps):
            step_of(one, [rows(one, r, ranks, options.batch, step) for r in range(ranks)])
        worst = max(float((state[n] - p.detach()).abs().max()) for n, p in one.named_parameters())
        moes = sum(isinstance(part, MoE) for part in spread.modules())
        print(json.dumps({
            "ranks": ranks, "experts": one.config.experts.experts, "moe_layers": moes,
            "parameters": sum(p.numel() for p in one.parameters()),
            "parameters_here": sum(local(p).numel() for p in spread.parameters()),
            "loss_of_rank_0": [round(loss, 4) for loss in losses],
            "largest_difference": worst, "bytes_per_step": bytes_sent // options.steps,
            "median_step_ms": round(1e3 * sorted(seconds)[len(seconds) // 2], 1),
        }))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
