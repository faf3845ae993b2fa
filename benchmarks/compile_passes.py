"""What compile_table.py compiles for: dtypes, widths and rules, and for each the passes that launch every kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

RULES = {"plain": 0.0, "uniform, ALiBi, dropout": 0.1}
SHAPES = [(torch.bfloat16, d, "plain") for d in (64, 88, 128, 256)] + [
    (torch.float32, d, "plain") for d in (64, 128)
]
SHAPES += [(torch.bfloat16, 128, "uniform, ALiBi, dropout")]
GROUPED = {"linear": "", "linear, swiglu, LoRA": "swiglu"}  # of grouped_linear: the width is x's
SHAPES += [(dtype, 1024, rules) for dtype in (torch.bfloat16, torch.float32) for rules in GROUPED]
EXPERT = "visual expert"  # the width is a head's
SHAPES += [(dtype, 128, EXPERT) for dtype in (torch.bfloat16, torch.float32)]
FRONT_END = "front end"  # the width is a patch's side
SHAPES += [(dtype, 14, FRONT_END) for dtype in (torch.bfloat16, torch.float32)]
SLICES = "packed slices"  # the width is a head's
SHAPES += [(torch.bfloat16, 64, SLICES), (torch.bfloat16, 104, SLICES), (torch.float32, 64, SLICES)]
MOE = "mixture of experts"  # the width is the number of experts
SHAPES += [(torch.bfloat16, experts, MOE) for experts in (4, 512)] + [(torch.float32, 128, MOE)]

Passes = tuple[list[Any], list[Callable[[], None]]]  # modules that hold kernels, and what launches these


def passes_of(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """The passes of one entry of SHAPES."""
    named = {
        EXPERT: _expert,
        FRONT_END: _front_end,
        SLICES: _slices,
        MOE: _moe,
        **dict.fromkeys(GROUPED, _grouped),
    }
    return named.get(rules, _attention)(dtype, width, rules)


def _attention(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """Over many rows and few keys and the other way round."""
    from mmkernels.primitives.interval_attention.triton import backward, forward, launch

    shapes = ((4096, 1024), (64, 4096))
    passes = [partial(_pass, launch, dtype, width, rows, keys, RULES[rules]) for rows, keys in shapes]
    return [backward, forward], passes  # type: ignore[return-value]


def _grouped(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """Over many rows, some, and those of a decoder; gathered and scattered, or where they stand."""
    from mmkernels.primitives.grouped_linear.triton import backward, launch, product
    from mmkernels.primitives.routing.triton import kernels
    from mmkernels.primitives.routing.triton import launch as routing

    passes = [partial(_grouped_pass, launch, dtype, width, rows, GROUPED[rules]) for rows in (8192, 160, 4)]
    if dtype == torch.float32 or GROUPED[rules]:
        return [backward, product], passes  # type: ignore[return-value]
    ids = torch.zeros(8192, dtype=torch.int32)
    routes = [partial(routing.route, ids, groups, 128) for groups in (2, 128)]  # once: no floats are in it
    return [backward, product, kernels], [*passes, *routes]  # type: ignore[return-value]


def _grouped_pass(launch: Any, dtype: torch.dtype, width: int, rows: int, activation: str) -> None:
    x, w = torch.empty(rows, width, dtype=dtype), torch.empty(2, 2 * width, width, dtype=dtype)
    counts, index = torch.zeros(2, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    extras: tuple[Tensor | None, ...] = (None,) * 8
    if activation:
        bias, scale, lora = (
            w[:, :, 0].contiguous(),
            x[:, 0].float(),
            (w[:, :16], w[:, :, :16].contiguous(), counts),
        )
        extras = (index, index, bias, scale, x, *lora)
    out, h = launch.forward(x, w, counts, *extras, activation, rows, bool(activation))
    launch.backward(out, x, w, counts, *extras, h, activation, rows, [True] * 7)


def _pass(launch: Any, dtype: torch.dtype, width: int, rows: int, keys: int, dropout: float) -> None:
    q, k = torch.empty(1, rows, 8, width, dtype=dtype), torch.empty(1, keys, 8, width, dtype=dtype)
    lo = torch.zeros(1, rows, dtype=torch.int32)
    extras: tuple[Tensor | None, ...] = (None, None, None)
    if dropout:
        extras = (lo.bool(), torch.ones(8), torch.zeros(1, dtype=torch.int64))
    rules = (lo, lo, *extras, 0.125, dropout)
    out, lse = launch.forward(q, k, k, *rules)
    launch.backward(out, lse if dropout else None, q, k, k, out, lse, *rules)


def _expert(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """Queries, keys and values that are turned; the products are grouped_linear's, with another stride between weights."""
    from mmkernels.ops.visual_expert.triton import kernels, launch
    from mmkernels.primitives.grouped_linear.triton import backward, product

    return [backward, product, kernels], [
        partial(_expert_pass, launch, dtype, width, rows) for rows in (8192, 4)
    ]


def _expert_pass(launch: Any, dtype: torch.dtype, width: int, rows: int) -> None:
    heads, c = 8, 1024
    x, w = torch.empty(rows, c, dtype=dtype), torch.empty(2, 3 * heads * width, c, dtype=dtype)
    counts, index = torch.zeros(2, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    first = (x, counts, index, index, w[0], w[1], None, w[1, :, 0].contiguous())
    table = (x[:, : width // 2].contiguous(),) * 2
    out, h = launch.forward(*first, None, *table, 2 * heads, "", False)
    launch.backward(out, *first, *table, h, 2 * heads, "", [True] * 5)


def _front_end(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """Pictures whose resize rounds to bytes, and whose does not."""
    from mmkernels.data.front_end.front_end import FrontEnd
    from mmkernels.data.front_end.triton import kernels

    picture = [torch.zeros(300, 400, 3, dtype=torch.uint8).numpy()]

    def one(rule: str) -> None:
        front = FrontEnd(rule, dtype=dtype, patch=width)
        plan = front.plan(400, 300)
        todo, rows = [], 0
        for job in front.rule.jobs(0, plan, width):
            placed, views = job.placed(rows)
            todo.append(placed)
            rows += sum(h * w for h, w in views)
        front._on_device(picture, todo, torch.empty(rows, 3 * width * width, dtype=dtype))

    return [kernels], [partial(one, rule) for rule in ("monkey", "llava_uhd", "fuyu")]


def _slices(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """Attention, and for one width the rows around it: a window's update, splicing."""
    from mmkernels.ops.sliced_image.triton import kernels, launch, launch_rows, rows

    passes = [partial(_slices_pass, launch, dtype, width)]
    if width != 64:
        return [kernels], passes  # type: ignore[return-value]
    return [kernels, rows], [*passes, partial(_rows_pass, launch_rows, dtype)]  # type: ignore[return-value]


def _slices_pass(launch: Any, dtype: torch.dtype, width: int) -> None:
    q, offsets = torch.empty(1024, 8, width, dtype=dtype), torch.tensor([0, 1024], dtype=torch.int32)
    out, lse = launch.forward(q, q, q, offsets, 0.125)
    launch.backward(out, q, q, q, out, lse, offsets, 0.125)


def _rows_pass(launch: Any, dtype: torch.dtype) -> None:
    x, a = torch.empty(1024, 1664, dtype=dtype), torch.empty(4, 16, 1664, dtype=dtype)
    b, index = a.transpose(1, 2).contiguous(), torch.zeros(1024, dtype=torch.int64)
    out, t = launch.lora(x, x, a, b, index)
    launch.lora_backward(out, x, a, b, index, t, [True] * 3)
    launch.splice_backward(launch.splice(x, x, x[:1], index), x, x, x[:1], index, [True] * 3)


def _moe(dtype: torch.dtype, width: int, rules: str) -> Passes:
    """Routers of both orders of arrival and every way to weigh; the sum; the products are grouped_linear's."""
    from mmkernels.ops.moe.triton import kernels, launch

    passes = [
        partial(_route_pass, launch, width, *rest)
        for rest in (("dropless", "before", 2), ("deepspeed_top2", "after", 2), ("topk_capacity", "", 8))
        if rest[2] <= width
    ]
    return [kernels], [*passes, partial(_sum_pass, launch, dtype)]


def _route_pass(launch: Any, experts: int, policy: str, renormalize: str, k: int) -> None:
    logits, mask = torch.zeros(4096, experts), torch.ones(4096, dtype=torch.bool)
    noise = logits if policy == "deepspeed_top2" else None
    capacity = -1 if policy == "dropless" else 100
    found = launch.route(logits, noise, mask, k, capacity, policy, renormalize, "mixtral")
    weights, ids, _, inverse, _, _, aux, z = found
    launch.route_backward(weights, aux, z, logits, mask, ids, inverse, policy, renormalize, "mixtral")


def _sum_pass(launch: Any, dtype: torch.dtype) -> None:
    y, inverse = torch.empty(512, 1024, dtype=dtype), torch.zeros(512, dtype=torch.int32)
    launch.combine(y, y[:, :2].float()[:256], inverse, torch.empty(256, 1024, dtype=dtype))
    launch.combine(y, None, inverse, torch.empty(256, 1024, dtype=dtype))
