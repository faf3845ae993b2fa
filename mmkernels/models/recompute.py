"""Selective activation checkpointing: blocks compute again in the backward pass what is cheap to compute.

What our ops return stays (attention, experts, fused sub-blocks: the costly part, and small); norms, projections and what lies
between are computed again from a block's input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = isinstance(op, torch._ops.OpOverload) and op.namespace == "mmkernels"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def again(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`block`, keeping its inputs and our ops' outputs; gradients are the same bits."""
    contexts = partial(create_selective_checkpoint_contexts, _keep)
    return partial(checkpoint, block, use_reentrant=False, context_fn=contexts)
