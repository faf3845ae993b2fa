"""Experts on two ranks: what one process computes, with uneven and with no tokens; with FSDP2 around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from mmkernels import models, weights
from mmkernels.layers import MoE
from mmkernels.train.parallel import clip_gradients, local, parallelize, whole_state

RANKS, WIDTH = 2, 16
TOKENS = ((7, 4), (5, 0), (0, 6), (0, 0))  # of each rank


def _layer(policy: str, activation: str) -> MoE:
    torch.manual_seed(0)
    factor = None if policy == "dropless" else 0.6
    return MoE(WIDTH, 24, 4, 2, policy=policy, capacity_factor=factor, activation=activation).double()


def _tokens(counts: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, WIDTH, dtype=torch.float64) for n in counts]


def _alone(layer: MoE, parts: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients of x, rank after rank, by a whole layer, whose parameters receive the sum."""
    inputs = [part.clone().requires_grad_() for part in parts]
    found = [layer(x) for x in inputs]
    sum((y.square().sum() + aux for y, aux in found), torch.zeros(())).backward()
    return [y for y, _ in found], [x.grad for x in inputs]  # type: ignore[misc]


def _layers_agree(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    for policy, activation in (("dropless", "swiglu"), ("deepspeed", "gelu_tanh"), ("dropless", "relu")):
        for counts in TOKENS:
            whole, parts = _layer(policy, activation), _tokens(counts)
            sharded = copy.deepcopy(whole).shard(group)
            assert sharded.w_in.shape[0] == 2 and sharded.first == 2 * rank
            outputs, grads = _alone(whole, parts)
            x = parts[rank].clone().requires_grad_()
            y, aux = sharded(x)
            (y.square().sum() + aux).backward()
            torch.testing.assert_close(y, outputs[rank])
            torch.testing.assert_close(x.grad, grads[rank])
            mine = slice(2 * rank, 2 * rank + 2)
            for name in ("w_in", "w_out", "b_in", "b_out"):
                expected, got = getattr(whole, name), getattr(sharded, name)
                if expected is not None:
                    torch.testing.assert_close(got.grad, expected.grad[mine], msg=f"{policy} {counts} {name}")
            dist.all_reduce(sharded.gate.weight.grad)
            torch.testing.assert_close(sharded.gate.weight.grad, whole.gate.weight.grad)
    theirs = {
        f"experts.deepspeed_experts.{e}.fc1.weight": torch.full((24, WIDTH), float(e)) for e in range(4)
    }
    theirs |= {
        f"experts.deepspeed_experts.{e}.fc2.weight": torch.full((WIDTH, 24), float(e)) for e in range(4)
    }
    theirs["gate.wg.weight"] = torch.ones(4, WIDTH)
    plain = MoE(WIDTH, 24, 4, 2, activation="gelu", bias=False).shard(group)
    weights.load(plain, theirs, source="deepspeed")  # reads its own experts of the whole file
    assert plain.w_in[:, 0, 0].tolist() == [2.0 * rank, 2.0 * rank + 1]
    with pytest.raises(ValueError, match="sharded already"):
        plain.shard(group)
    with pytest.raises(ValueError, match="got 2 ranks for 3 experts"):
        MoE(WIDTH, 24, 3, 2).shard(group)


def _tiny() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model: Any = models.build("moe_llava-tiny")
    model.enter(model.stages()[-1])
    rows = []
    for rank in range(RANKS):
        prompts = torch.randint(4, 500, (2, 4 + rank))
        prompts[:, 0] = 2
        ids, mask = model.expand(prompts)
        rows.append(
            {"images": torch.randn(2, 1, 3, 32, 32), "input_ids": ids, "attention_mask": mask, "labels": ids}
        )
    return model, rows


def _a_step_agrees(rank: int) -> None:
    """A step of the model spread over two ranks is a step on the mean of their losses."""
    one, rows = _tiny()
    spread, mesh = copy.deepcopy(one), init_device_mesh("cpu", (RANKS,))
    parallelize(spread, mesh)
    kept = sum(local(p).numel() for p in spread.parameters())
    assert kept < 0.55 * sum(p.numel() for p in one.parameters())
    for _ in range(2):
        for model, batches in ((one, rows), (spread, rows[rank : rank + 1])):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for batch in batches:
                (model(**batch).loss / len(batches)).backward()
            if model is one:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                assert abs(float(clip_gradients(model.parameters(), 0.5, mesh)) / float(norm) - 1) < 1e-4
            optimizer.step()
    state = whole_state(spread, mesh)
    assert state.keys() == dict(one.named_parameters()).keys()
    for name, expected in one.named_parameters():
        torch.testing.assert_close(state[name], expected.detach(), rtol=1e-4, atol=1e-5, msg=name)


def _work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    _layers_agree(rank)
    _a_step_agrees(rank)
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does(tmp_path):
    mp.spawn(_work, (str(tmp_path / "store"),), nprocs=RANKS)
