"""The router: schema, gradient, public functions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.moe import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op
from mmkernels.primitives.routing import route_groups

POLICIES = (*reference.RULES, "deepspeed")
BALANCES = ("deepspeed", "mixtral", "megablocks")
NORMALIZE = (True, False, "before", "after")


class Routing(NamedTuple):
    """Who goes where. `weights [T, K]` are 0 and `inverse [T K]` -1 where a route was dropped; `experts [T, K]` int32.

    `order [T K]` int32: the kept routes `t K + j` in the order of the experts' buffers, `counts [E]` of them in each, -1 past
    the last; `inverse` their places. `chosen [E]` counts routes before any was dropped. `aux_loss` and `z_loss` are scalars.
    """

    weights: Tensor
    experts: Tensor
    order: Tensor
    counts: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    inverse: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, experts: Tensor, weights: Tensor, num_experts: int) -> Routing:
        """A routing chosen elsewhere: ids and weights `[T, K]`; the id `num_experts` is a route to nobody here.

        Nothing is dropped; both losses are 0. **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1)
        for ids below 0 or above `num_experts`; kernels take such a route as one to nobody. TypeError for dtypes.
        """
        _check.shapes(experts=(experts, "T K"), weights=(weights, "T K"))
        _check.dtypes((torch.int32, torch.int64), experts=experts)
        _check.dtypes(_check.FLOATS, weights=weights)
        _check.positive(num_experts=num_experts)
        groups = route_groups(experts.reshape(-1).to(torch.int32), num_experts)
        weights = torch.where(groups.inverse.view(weights.shape) >= 0, weights, 0)
        zero = weights.new_zeros(())
        ids = experts.to(torch.int32)
        return cls(weights, ids, groups.order, groups.counts, zero, zero, groups.inverse, groups.counts)


def _fake_forward(logits: Tensor, noise: Any, mask: Any, k: int, *_: Any) -> tuple[Tensor, ...]:
    (t, e), wide = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    routes = [logits.new_empty(t * k, dtype=torch.int32) for _ in range(2)]
    counts = [logits.new_empty(e, dtype=torch.int32) for _ in range(2)]
    losses = [logits.new_empty((), dtype=wide) for _ in range(2)]
    weights, experts = (logits.new_empty((t, k), dtype=d) for d in (wide, torch.int32))
    return weights, experts, *routes, *counts, *losses


def _fake_backward(dweights: Tensor, daux: Tensor, dz: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


FORWARD = Op(
    "moe_route(Tensor logits, Tensor? noise, Tensor? mask, int k, int capacity, str policy, str renormalize, str balance) -> "
    "(Tensor weights, Tensor experts, Tensor order, Tensor inverse, Tensor counts, Tensor chosen, Tensor aux_loss, "
    "Tensor z_loss)",
    reference.forward,
    fake=_fake_forward,
)
BACKWARD = Op(
    "moe_route_backward(Tensor dweights, Tensor daux, Tensor dz, Tensor logits, Tensor? mask, Tensor experts, "
    "Tensor inverse, str policy, str renormalize, str balance) -> Tensor dlogits",
    reference.backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, _, _, *ctx.rules = inputs
    ctx.save_for_backward(logits, mask, output[1], output[3])
    ctx.mark_non_differentiable(*output[1:6])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dweights, daux, dz = grads[0], grads[6], grads[7]
    return BACKWARD(dweights.contiguous(), daux, dz, *ctx.saved_tensors, *ctx.rules), *[None] * 7


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def moe_capacity(tokens: int, experts: int, factor: float, k: int = 1, *, least: int = 0) -> int:
    """How many routes an expert has places for: `max(ceil(tokens / experts * factor * k), least)`.

    **Shapes** none: numbers in, a number out. **Dtypes** float32 arithmetic, as published: 25 tokens to 2 experts at factor 1.2
    make 16 places, where exact arithmetic gives 15. **Gradient** none. **Edge** no tokens: `least`. **Raises** ValueError for
    experts or k below 1. **Source** DeepSpeed's gating; MoE-LLaVA (arXiv 2401.15947). **Speed** host arithmetic.
    """
    _check.positive(experts=experts, k=k)
    share = torch.tensor(tokens / experts, dtype=torch.float32) * torch.tensor(
        factor * k, dtype=torch.float32
    )
    return max(math.ceil(share.item()), least)


def moe_route(
    logits: Tensor,
    k: int,
    *,
    renormalize: bool | str = True,
    capacity: int | None = None,
    policy: str = "dropless",
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    balance: str | None = None,
) -> Routing:
    """Chooses k experts for every token and gives each kept choice a place, in one pass, without a sort or the host.

    `p = softmax(logits)` in float32; the k largest `logits + noise`; `w = p / sum(p)` over the chosen.

    | policy | who is dropped | weights | aux_loss (balanced value) |
    |---|---|---|---|
    | `dropless` (Mixtral) | nobody | p / sum, before dropping | `E sum_e f_e P_e` (k) |
    | `topk_capacity` (MegaBlocks) | later tokens | p / sum, before dropping | `E / k sum_e f_e P_e` (1) |
    | `deepspeed_top1` | those of the smallest draw `noise`; without one, later tokens | p | `E sum_e f_e P_e` (1) |
    | `deepspeed_top2` | second choices before first ones, then later tokens | after dropping | of first choices (1) |
    | `deepspeed_position` | later tokens | after dropping | `E / k sum_e f_e P_e` (1) |
    | `deepspeed_probs` | the smallest p | after dropping | `E / k sum_e f_e P_e` (1) |

    `deepspeed` is top1, top2 or probs by k. f_e is the share of tokens that chose e before dropping, P_e the mean p, z_loss the
    mean of `logsumexp(logits)^2`. `renormalize` True: as above; False: p; "before" or "after" dropping. `capacity`: the places
    of an expert, None for no limit (`moe_capacity` counts as published). `balance` takes another policy's aux_loss: "mixtral",
    "megablocks" or "deepspeed" (first choices).

    **Shapes** logits `[T, E]`; noise `[T, E]`: for deepspeed_top1 the draw of its random token selection, for deepspeed_top2
    Gumbel noise on the second choice, else noise on every choice; mask `[T]`, False at padding, which goes nowhere, takes no
    place and counts in no loss (in deepspeed_top1's as published: it counts in P and T). Returns a `Routing`.
    **Dtypes** logits and noise float32, bfloat16, float16, float64; weights and losses float32 (float64), under autocast too.
    **Gradient** logits, from weights and both losses; none through the choice; deterministic; once differentiable.
    **Edge** equal logits: the lowest id. A row with NaN or infinities chooses k different experts with finite weights (NaN is
    the lowest number), has no gradient and is not in z_loss. Capacity 0 drops all; no tokens: losses 0.
    **Raises** ValueError for shapes, k > E, k that does not fit the policy, a capacity below 0 or for dropless, and names;
    TypeError for dtypes.
    **Source** MoE-LLaVA (arXiv 2401.15947) with DeepSpeed's gating; Mixtral (arXiv 2401.04088); MegaBlocks (arXiv 2211.15841).
    **Speed** `mmkernels bench --op moe_route`. deepspeed_probs and a draw sort the routes.

    >>> routing = moe_route(x.float() @ wg.T, 2, policy="deepspeed_top2", capacity=moe_capacity(len(x), 4, 1.5, 2))
    >>> y = moe_ffn(x, routing, w_in, w_out)
    """
    _check_route(logits, k, noise, mask, capacity)
    _check.choice("policy", policy, POLICIES)
    _check.choice("renormalize", renormalize, NORMALIZE)
    policy = _policy(policy, k, capacity)
    rule = reference.RULES[policy]
    if balance is not None:
        _check.choice("balance", balance, BALANCES)
    how = rule.normalize if renormalize is True else renormalize or ""
    places = -1 if capacity is None else capacity
    found = FORWARD(logits, noise, mask, k, places, policy, how, balance or rule.balance)
    weights, experts, order, inverse, counts, chosen, aux, z = found
    return Routing(weights, experts, order, counts, aux, z, inverse, chosen)


def _policy(policy: str, k: int, capacity: int | None) -> str:
    if policy == "deepspeed":
        return {1: "deepspeed_top1", 2: "deepspeed_top2"}.get(k, "deepspeed_probs")
    wanted = {"deepspeed_top1": 1, "deepspeed_top2": 2}.get(policy, k)
    if k != wanted:
        raise ValueError(f"k: got {k} with policy {policy!r}, expected {wanted}")
    if policy == "dropless" and capacity is not None:
        raise ValueError(f"capacity: got {capacity} with policy 'dropless', expected None")
    return policy


def _check_route(
    logits: Tensor, k: int, noise: Tensor | None, mask: Tensor | None, capacity: int | None
) -> None:
    size = _check.shapes(logits=(logits, "T E"), noise=(noise, "T E"), mask=(mask, "T"))
    _check.dtypes(_check.FLOATS, logits=logits)
    _check.dtypes(_check.FLOATS, noise=noise)
    _check.dtypes((torch.bool,), mask=mask)
    _check.devices(logits=logits, noise=noise, mask=mask)
    if not 1 <= k <= size["E"]:
        raise ValueError(f"k: got {k}, expected 1 to the {size['E']} experts of logits")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: got {capacity}, expected at least 0, or None for no limit")


def load_balancing_loss(
    logits: Tensor | tuple[Tensor, ...], experts: int | Tensor, k: int, mask: Tensor | None = None
) -> Tensor:
    """Mixtral's loss over the tokens of all layers: `E sum_e f_e P_e`, f_e the routes to e by tokens, P_e the mean p.

    **Shapes** logits `[T, E]`, of one layer or a tuple of layers; experts: their number E, or the ids `[T, k]` chosen (of all
    layers, one after the other); mask `[B, L]` or `[T]` of one layer, 0 or False at padding, which does not count.
    **Dtypes** floating logits; the result float32 (float64). **Gradient** logits. **Edge** balanced routing gives k, no tokens
    give 0; NaN counts as the lowest logit. **Raises** ValueError for shapes and k, TypeError for dtypes.
    **Source** Mixtral (arXiv 2401.04088); Switch Transformer (arXiv 2101.03961). **Speed** a few small torch operations.
    """
    layers = (logits,) if isinstance(logits, Tensor) else tuple(logits)
    if not layers:
        raise ValueError("logits: got no layer, expected at least one tensor [T, E]")
    rows = torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in layers])
    _check_route(rows, k, None, None, None)
    p = reference.finite(rows).softmax(1)
    ids = (
        experts
        if isinstance(experts, Tensor)
        else reference.choose(reference.finite(rows), None, k, "dropless")
    )
    if isinstance(experts, int) and experts != rows.shape[1]:
        raise ValueError(f"experts: got {experts}, expected {rows.shape[1]} as logits has columns")
    _check.shapes(logits=(rows, "T E"), experts=(ids, f"T {k}"))
    weight = p.new_ones(len(p)) if mask is None else mask.reshape(-1).to(p.dtype).repeat(len(layers))
    _check.shapes(logits=(rows, "T E"), mask=(weight, "T"))
    weight = (weight / weight.sum().clamp(min=1)).unsqueeze(1)
    every = torch.arange(rows.shape[1], device=rows.device)
    hits = sum(((ids[:, j : j + 1] == every) * weight).sum(0) for j in range(k))
    return rows.shape[1] * (hits * (p * weight).sum(0)).sum()
