"""Two ranks see each other's batch: features without a gradient, images with everybody's."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmkernels.models.gather import gather, gather_with_gradient, rank


def _work(number: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    x = (torch.arange(4.0).view(2, 2) + 10 * number).requires_grad_()
    expected = torch.tensor([[0.0, 1], [2, 3], [10, 11], [12, 13]])
    assert rank() == number
    assert torch.equal(gather(x), expected) and not gather(x).requires_grad
    assert torch.equal(gather(torch.tensor([number == 0])), torch.tensor([True, False]))
    weight = torch.arange(8.0).view(4, 2) * (number + 1)
    (gather_with_gradient(x) * weight).sum().backward()
    assert torch.equal(x.grad, 3 * torch.arange(8.0).view(4, 2)[2 * number : 2 * number + 2])
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    mp.spawn(_work, (str(tmp_path / "store"),), nprocs=2)


def test_one_process_needs_no_group():
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_with_gradient(x) is x and rank() == 0
    assert torch.equal(gather(x), x) and not gather(x).requires_grad
