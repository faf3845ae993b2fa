"""How fast a run goes: tokens that its language model read, and what share of the device's peak the products of a step are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.train.flops import counters
from mmkernels.train.plan import GPUS


class Throughput:
    """Counts the tokens of every step, and the FLOPs of a stage's first one, which its others are taken to have too."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.tokens, self.device = 0, device
        self.flops: float | None = None
        self.peak = _peak(device)
        model.register_forward_pre_hook(self._read, with_kwargs=True)

    def begin_stage(self) -> None:
        self.flops = None

    def begin_step(self, gradients: Callable[[], object], optimizer: torch.optim.Optimizer) -> None:
        """Before a stage's first step its gradients are computed once more, to be counted: under a counter some products take
        another path, whose last bits differ, and a resumed run counts at another step.
        """
        if self.flops is None:
            devices = [torch.cuda.current_device()] if self.device.startswith("cuda") else []
            with (
                torch.random.fork_rng(devices),
                FlopCounterMode(display=False, custom_mapping=counters()) as mode,
            ):
                gradients()
            optimizer.zero_grad()
            self.flops = float(mode.get_total_flops())
        self.tokens = 0

    def record(self, seconds: float) -> dict[str, Any]:
        assert self.flops is not None
        speed = {"tokens_per_second": round(self.tokens / seconds, 1)}
        speed["gflops_per_second"] = round(self.flops / seconds / 1e9, 2)
        if self.peak:
            speed["mfu"] = round(self.flops / seconds / self.peak, 4)
        return {"tokens": self.tokens, "speed": speed}

    def _read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[1] if len(args) > 1 else None)
        self.tokens += 0 if ids is None else ids.numel()


def _peak(device: str) -> float | None:
    """Dense bfloat16 FLOP/s by the data sheet, where the GPU is one of `plan.GPUS`; elsewhere there is no MFU."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((machine.flops for known, machine in GPUS.items() if known in name), None)
