"""The compiled router, C++ and CUDA: rules as numbers, and what it leaves to the law."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.moe import route
from mmkernels.ops.moe.reference import RULES, Rule
from mmkernels.primitives._op import LIBRARY

_RULES = "bool choices, bool whole, int drop, int normalize, int balance"
_ROUTES = "Tensor weights, Tensor experts, Tensor order, Tensor inverse, Tensor counts, Tensor chosen, Tensor aux, Tensor z"
_DROPS, _NORMALIZE = ("position", "noise", "probs"), ("", "before", "after")
_BALANCES = ("deepspeed", "mixtral", "megablocks")

for _device in ("cpu", "cuda"):
    LIBRARY.define(
        f"moe_choose__{_device}(Tensor logits, Tensor? noise, Tensor? mask, int k, int capacity, {_RULES}) -> ({_ROUTES})"
    )
    LIBRARY.define(
        f"moe_choose_backward__{_device}(Tensor dweights, Tensor daux, Tensor dz, Tensor logits, Tensor? mask, Tensor experts, "
        "Tensor inverse, bool whole, int normalize, int balance) -> Tensor"
    )


def _plain(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask.contiguous()


def _numbers(rule: Rule, renormalize: str, balance: str) -> tuple[int, int, int]:
    return _DROPS.index(rule.drop or "position"), _NORMALIZE.index(renormalize), _BALANCES.index(balance)


def _whole(policy: str) -> bool:
    return policy == "deepspeed_top1"


def _operator(name: str, device: str) -> Callable[..., Any]:
    return getattr(torch.ops.mmkernels, f"{name}__{device}").default


def forward(
    logits: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    k: int,
    capacity: int,
    policy: str,
    renormalize: str,
    balance: str,
) -> tuple[Tensor, ...]:
    """The operator moe_route."""
    rule = RULES[policy]
    drop, normalize, balanced = _numbers(rule, renormalize, balance)
    noise = noise if noise is None else noise.to(torch.float32).contiguous()
    rest = (k, capacity, rule.choices, _whole(policy), drop, normalize, balanced)
    return _operator("moe_choose", logits.device.type)(logits, noise, _plain(mask), *rest)


def backward(
    dweights: Tensor,
    daux: Tensor,
    dz: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    experts: Tensor,
    inverse: Tensor,
    policy: str,
    renormalize: str,
    balance: str,
) -> Tensor:
    """The operator moe_route_backward."""
    _, normalize, balanced = _numbers(RULES[policy], renormalize, balance)
    found = (dweights, daux, dz, logits, _plain(mask), experts.contiguous(), inverse.contiguous())
    run = _operator("moe_choose_backward", logits.device.type)
    return run(*found, _whole(policy), normalize, balanced)


def _narrow(*args: Any) -> str:
    """float64 goes to the law: the first tensor is the logits, or a gradient that is as wide."""
    return "float64 runs on the reference" if args[0].dtype == torch.float64 else ""


@functools.cache  # asked at every call; modules are loaded before their operators are registered
def _present(name: str) -> str:
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{name}", name.split("__")[1].upper())
    return "" if found else f"{name} is not compiled in this installation"


MOST_EXPERTS, MOST_ROUTES = 1024, 16  # of the CUDA kernel: a token's row lives in a warp's registers


def _cuda(
    logits: Tensor,
    noise: Tensor | None,
    mask: Any,
    k: int,
    capacity: int,
    policy: str,
    how: str,
    balance: str,
) -> str:
    rule = RULES[policy]
    if capacity >= 0 and (rule.drop == "probs" or (rule.drop == "noise" and noise is not None)):
        return f"{policy} keeps the best routes, which is a sort: the reference has it"
    if balance == "deepspeed" and not rule.choices and k > 1:
        return f"{policy} does not count first choices apart"
    return _fits(logits, k)


def _fits(logits: Tensor, k: int) -> str:
    if logits.shape[1] > MOST_EXPERTS or k > MOST_ROUTES:
        return f"{logits.shape[1]} experts, {k} routes: it takes {MOST_EXPERTS} and {MOST_ROUTES}"
    return _narrow(logits)


def _cuda_backward(dweights: Tensor, daux: Tensor, dz: Tensor, logits: Tensor, *rest: Any) -> str:
    return _fits(logits, rest[1].shape[1])


def _register(device: str, backend: str, **supports: Callable[..., str]) -> None:
    for op, name, call in (
        (route.FORWARD, "moe_choose", forward),
        (route.BACKWARD, "moe_choose_backward", backward),
    ):
        present = functools.partial(_present, f"{name}__{device}")
        op.register(device, backend, call, supports=supports[name], present=present)


_register("cpu", "cpp", moe_choose=_narrow, moe_choose_backward=_narrow)
_register("cuda", "cuda", moe_choose=_cuda, moe_choose_backward=_cuda_backward)
