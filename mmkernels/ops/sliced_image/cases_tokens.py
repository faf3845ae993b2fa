"""Splicing and region pooling as data, and what published code writes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.sliced_image.cases_shared import (
    BF16,
    F16,
    F32,
    F64,
    UHD,
    Run,
    a_bench,
    a_test,
    drawer,
    slices_of,
)
from mmkernels.ops.sliced_image.pooling import region_pool
from mmkernels.ops.sliced_image.regions import pool_size
from mmkernels.ops.sliced_image.splice import splice_embeddings
from mmkernels.primitives._case import Cost, Inputs, Room

# ---- splicing


def make_splice(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z = {
        "batch": 2,
        "tokens": 11,
        "width": 6,
        "special": 0,
        "runs": ((0, 2, 4), (1, 1, 3)),
        "wide": False,
        "rows": 0,
    }
    z |= sizes
    draw = drawer(seed, dtype, device)
    index = torch.full((z["batch"], z["tokens"]), -1, dtype=torch.int64)
    count = 0
    for row, start, length in z["runs"]:
        for t in range(start, start + length):
            newline = z["special"] and (t - start) % 4 == 3
            index[row, t] = -2 if newline else count
            count += not newline
    x: Inputs = {"tokens": draw(z["batch"], z["tokens"], z["width"]), "positions": index.to(device)}
    x["visual"] = draw(count + z["rows"], z["width"])
    x["visual"] = x["visual"].to(torch.promote_types(dtype, F32)) if z["wide"] else x["visual"]
    x["special"] = draw(z["special"], z["width"]) if z["special"] else None
    return x


def call_splice(x: Inputs) -> Tensor:
    return splice_embeddings(x["tokens"], x["visual"], x["positions"], special=x["special"])


def eager_splice(x: Inputs) -> Run:
    """As published: every sequence cut into runs of text, pictures and newlines, which are joined again."""
    plans = []
    for row in x["positions"].tolist():
        plan: list[list[int]] = []
        for t, i in enumerate(row):
            kind = min(i, 0)
            if plan and plan[-1][0] == kind and (kind == -1 or (kind == 0 and plan[-1][2] == i)):
                plan[-1][2] = i + 1 if kind == 0 else t + 1
            else:
                first = i if kind == 0 else t
                plan.append([kind, first, first + 1])
        plans.append(plan)

    def run() -> Tensor:
        rows = []
        for tokens, plan in zip(x["tokens"], plans, strict=True):
            parts = [tokens[:0]]
            for kind, start, stop in plan:
                if kind <= -2:
                    parts.append(x["special"][-2 - kind][None])
                else:
                    parts.append((x["visual"] if kind == 0 else tokens)[start:stop].to(tokens.dtype))
            rows.append(torch.cat(parts))
        return torch.stack(rows) if rows else x["tokens"].clone()

    return run


def cost_splice(x: Inputs) -> Cost:
    return Cost(0.0, 2.0 * x["tokens"].numel() * x["tokens"].element_size(), backward=0.0, backward_bytes=1.0)


SPLICE_TESTS = (
    a_test("uneven", F32, BF16, F16, F64),
    a_test("newlines", special=2, runs=((0, 1, 9), (1, 0, 11))),
    a_test("wide-visual", BF16, F16, wide=True),
    a_test("unused-rows", rows=3),
    a_test("text", runs=()),
    a_test("no-tokens", tokens=0, runs=()),
    a_test("no-batch", batch=0, runs=()),
)

SPLICE_BENCH = (
    a_bench("llava-next-2x2", batch=4, tokens=3072, width=4096, special=1,
           runs=tuple((b, 35, 2928) for b in range(4))),
    a_bench("llava15-b8", batch=8, tokens=704, width=4096, runs=tuple((b, 35, 576) for b in range(8))),
)  # fmt: skip

# ---- region pooling


def make_region(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z = {"slices": ((5, 7), (2, 9)), "width": 4, "grid": 3} | sizes
    draw, (hw, patches) = drawer(seed, dtype, device), slices_of(z["slices"], device)
    return {"x": draw(patches, z["width"]), "slice_hw": hw, "slices": z["slices"], "grid": z["grid"]}


def call_region(x: Inputs) -> Tensor:
    return region_pool(x["x"], x["slice_hw"], grid=x["grid"])


def _axis(size: int, g: int, bins: int, like: Tensor) -> Tensor:
    """The reading matrix of one axis [g, bins, size], sample by sample as RoIAlign's loop goes."""
    matrix = torch.zeros(g, bins, size, dtype=torch.promote_types(like.dtype, F32))
    edges = torch.tensor([i * size / g for i in range(g + 1)], dtype=F64).to(like.dtype).tolist()
    for i in range(g):
        one = max(edges[i + 1] - edges[i], 1.0) / bins
        samples = math.ceil(one)
        for b in range(bins):
            for n in range(samples):
                place = edges[i] + b * one + (n + 0.5) * one / samples
                if place > size:
                    continue
                low = min(int(place), size - 1)
                high = min(low + 1, size - 1)
                t = 0.0 if low == size - 1 else place - low
                matrix[i, b, low] += (1 - t) / samples
                matrix[i, b, high] += t / samples
    return matrix.to(device=like.device, dtype=like.dtype)


def eager_region(x: Inputs) -> Run:
    """Slice by slice, each axis by its own matrix."""
    plans = [
        (h, w, _axis(h, x["grid"], oh, x["x"]), _axis(w, x["grid"], ow, x["x"]))
        for h, w in x["slices"]
        if h * w
        for ow, oh in [pool_size(w / h)]
    ]

    def run() -> Tensor:
        out, start, at = x["x"].new_zeros(len(x["slices"]), x["grid"] ** 2, 12, x["x"].shape[1]), 0, 0
        found = []
        for h, w in x["slices"]:
            if not h * w:
                found.append(out[0])
                continue
            _, _, rows, columns = plans[at]
            part = x["x"][start : start + h * w].view(h, w, -1)
            pooled = torch.einsum("iahc,jbh->ijabc", torch.einsum("iay,yxc->iaxc", rows, part), columns)
            pooled = pooled.flatten(2, 3).flatten(0, 1)
            found.append(F.pad(pooled, (0, 0, 0, 12 - pooled.shape[1])))
            start, at = start + h * w, at + 1
        return torch.stack(found) if found else out + 0 * x["x"].sum()

    return run


def cost_region(x: Inputs) -> Cost:
    keys = sum(math.prod(pool_size(w / h)) for h, w in x["slices"] if h * w) * x["grid"] ** 2
    moved = (keys + len(x["x"])) * x["x"].shape[1] * x["x"].element_size()
    return Cost(8.0 * keys * x["x"].shape[1], float(moved), backward=1.0, backward_bytes=1.0)


REGION_TESTS = (
    a_test("uneven", F32, BF16, F16, F64),
    a_test("large-cells", slices=((40, 9), (4, 37)), grid=2),
    a_test("small-map", slices=((1, 2), (3, 1)), grid=4),
    a_test("empty-slices", slices=((0, 3), (2, 2), (0, 0))),
    a_test("no-slices", slices=()),
)

REGION_BENCH = (a_bench("uhd-7slice", headline=True, slices=UHD, width=1024, grid=12),)


ROOMS = (
    Room(
        name="splice_embeddings",
        make=make_splice,
        call=call_splice,
        differentiable=("tokens", "visual", "special"),
        tests=SPLICE_TESTS,
        bench=SPLICE_BENCH,
        cost=cost_splice,
        peers={"eager": eager_splice},
        ops=("splice_embeddings", "splice_embeddings_backward"),
    ),
    Room(
        name="region_pool",
        make=make_region,
        call=call_region,
        differentiable=("x",),
        tests=REGION_TESTS,
        bench=REGION_BENCH,
        cost=cost_region,
        peers={"eager": eager_region},
        ops=("region_pool", "region_pool_backward"),
    ),
)
