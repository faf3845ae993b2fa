"""Patch embedding and per-window LoRA as data, and what published code writes."""

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
from mmkernels.ops.sliced_image.lora import segment_lora
from mmkernels.ops.sliced_image.op import slice_patch_embed
from mmkernels.primitives._case import Cost, Inputs, Room

# ---- patch embedding


def make_embed(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z = {
        "slices": ((2, 3), (4, 4), (1, 7)),
        "inputs": 12,
        "width": 10,
        "grid": (4, 4),
        "prefix": 0,
        "bias": False,
    }
    z |= {"rule": {}, "table": True} | sizes
    draw, (hw, patches) = drawer(seed, dtype, device), slices_of(z["slices"], device)
    x: Inputs = {
        "patches": draw(patches, z["inputs"]),
        "slice_hw": hw,
        "slices": z["slices"],
        "grid": z["grid"],
    }
    x["weight"] = draw(z["width"], z["inputs"], scale=z["inputs"] ** -0.5)
    x["bias"] = draw(z["width"]) if z["bias"] else None
    x["positions"] = draw(math.prod(z["grid"]), z["width"]) if z["table"] else None
    x["prefix"] = draw(z["prefix"], z["width"]) if z["prefix"] else None
    return x | {"rule": z["rule"]}


def call_embed(x: Inputs) -> Tensor:
    grid = x["grid"] if x["positions"] is not None else None
    return slice_patch_embed(
        x["patches"], x["weight"], x["slice_hw"], bias=x["bias"], positions=x["positions"], prefix=x["prefix"], grid=grid,
        **x["rule"],
    )  # fmt: skip


def _stretched(x: Inputs, h: int, w: int) -> Tensor:
    table, (gh, gw) = x["positions"].to(torch.promote_types(x["positions"].dtype, F32)), x["grid"]
    if (h, w) == (gh, gw):
        return x["positions"]
    rule = {"mode": "bicubic", "align_corners": False, "antialias": False} | x["rule"]
    offset = rule.pop("offset", None)
    to = {"size": (h, w)} if offset is None else {"scale_factor": ((h + offset) / gh, (w + offset) / gw)}
    cells = F.interpolate(table.view(1, gh, gw, -1).permute(0, 3, 1, 2), **to, **rule)
    return cells.permute(0, 2, 3, 1).flatten(0, 2).to(x["positions"].dtype)


def eager_embed(x: Inputs) -> Run:
    """As published: slice by slice, a table stretched for each."""

    def run() -> Tensor:
        rows, start = [F.linear(x["patches"][:0], x["weight"], x["bias"])], 0
        for h, w in x["slices"]:
            part = F.linear(x["patches"][start : start + h * w], x["weight"], x["bias"])
            start += h * w
            rows += [] if x["prefix"] is None else [x["prefix"]]
            rows.append(part + _stretched(x, h, w) if x["positions"] is not None and h * w else part)
        return torch.cat(rows)

    return run


def cost_embed(x: Inputs) -> Cost:
    (p, k), c = x["patches"].shape, len(x["weight"])
    cells = 0 if x["positions"] is None else x["positions"].numel()
    return Cost(
        2.0 * p * k * c, float((p * (k + c) + k * c + cells) * x["patches"].element_size()), backward=1.0
    )


EMBED_TESTS = (
    a_test("uneven", F32, BF16, F16, F64, bias=True, prefix=1),
    a_test("bilinear", rule={"mode": "bilinear"}),
    a_test("antialiased", rule={"antialias": True}),
    a_test("corners", rule={"mode": "bilinear", "align_corners": True}, prefix=3),
    a_test("scale-factor", rule={"offset": 0.1}, grid=(3, 5)),
    a_test("no-table", table=False, bias=True),
    a_test("one-patch", slices=((1, 1),)),
    a_test("empty-slices", slices=((0, 2), (3, 3), (0, 0)), prefix=2),
    a_test("no-slices", slices=(), bias=True, prefix=1),
)

_CLIP = {"slices": UHD, "inputs": 588, "width": 1024, "grid": (24, 24), "prefix": 1}
EMBED_BENCH = (
    a_bench("uhd-7slice", headline=True, **_CLIP),
    a_bench("bigg-5windows", slices=((32, 32),) * 5, inputs=588, width=1664, grid=(16, 16)),
)

# ---- per-window LoRA


def make_lora(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z = {
        "runs": ((0, 4), (2, 3), (-1, 5), (0, 2)),
        "inputs": 12,
        "width": 10,
        "windows": 3,
        "rank": 4,
        "wide": False,
    }
    z |= {"layer": False} | sizes
    draw = drawer(seed, dtype, device)
    lengths = torch.tensor([n for _, n in z["runs"]], dtype=torch.int64)
    segment = torch.tensor([w for w, _ in z["runs"]], dtype=torch.int64).repeat_interleave(lengths).to(device)
    rows, c, n = len(segment), z["inputs"], z["width"]
    base = None if z["layer"] else draw(rows, n)
    x: Inputs = {"x": draw(rows, c), "segment": segment.to(torch.int32)}
    x["base"] = base.to(torch.promote_types(dtype, F32)) if base is not None and z["wide"] else base
    x["weight"] = draw(n, c, scale=c**-0.5) if z["layer"] else None
    x["a"] = draw(z["windows"], z["rank"], c, scale=c**-0.5)
    x["b"] = draw(z["windows"], n, z["rank"], scale=z["rank"] ** -0.5)
    return x


def _base(x: Inputs) -> Tensor:
    return x["base"] if x["weight"] is None else F.linear(x["x"], x["weight"])


def call_lora(x: Inputs) -> Tensor:
    return segment_lora(x["x"], _base(x), x["a"], x["b"], x["segment"])


def eager_lora(x: Inputs) -> Run:
    """As PEFT mixes adapters in a batch: for each, its rows are picked, updated and added back."""
    rows = [(x["segment"] == w).nonzero().squeeze(1) for w in range(len(x["a"]))]

    def run() -> Tensor:
        out = _base(x).clone()
        for w, own in enumerate(rows):
            if len(own):
                out = out.index_add(
                    0, own, F.linear(F.linear(x["x"][own], x["a"][w]), x["b"][w]).to(out.dtype)
                )
        return out

    return run


def without(x: Inputs) -> Run:
    """The layer without its LoRA: what the update is laid upon."""
    return lambda: _base(x).clone() if x["weight"] is None else _base(x)


def cost_lora(x: Inputs) -> Cost:
    (rows, c), (_, n, r) = x["x"].shape, x["b"].shape
    used = int((x["segment"] >= 0).sum())
    base = 0 if x["weight"] is None else n * c
    moved = rows * (c + n * (2 if base == 0 else 1)) + base + x["a"].numel() + x["b"].numel()
    return Cost(
        2.0 * used * r * (c + n) + 2.0 * rows * base, float(moved * x["x"].element_size()), backward=2.0
    )


LORA_TESTS = (
    a_test("uneven", F32, BF16, F16, F64),
    a_test("wide-base", BF16, F16, wide=True),
    a_test("layer", layer=True),
    a_test("many", runs=tuple((w % 4 - 1, 1 + 7 * w % 5) for w in range(40)), rank=16, inputs=40, width=33),
    a_test("none", runs=((-1, 6),)),
    a_test("no-rows", runs=()),
)

_MONKEY = {
    "runs": tuple((w, 1024) for w in (0, 1, 2, 3, -1)), "inputs": 1664, "windows": 4, "rank": 16, "layer": True,
}  # fmt: skip
LORA_BENCH = (
    a_bench("monkey-in-proj", headline=True, **_MONKEY, width=4992),
    a_bench("monkey-out-proj", **_MONKEY, width=1664),
)


ROOMS = (
    Room(
        name="slice_patch_embed",
        make=make_embed,
        call=call_embed,
        differentiable=("patches", "weight", "bias", "positions", "prefix"),
        tests=EMBED_TESTS,
        bench=EMBED_BENCH,
        cost=cost_embed,
        peers={"eager": eager_embed},
        ops=("slice_patch_embed", "slice_patch_embed_backward"),
    ),
    Room(
        name="segment_lora",
        make=make_lora,
        call=call_lora,
        differentiable=("x", "base", "weight", "a", "b"),
        tests=LORA_TESTS,
        bench=LORA_BENCH,
        cost=cost_lora,
        peers={"eager": eager_lora, "without": without},
        ops=("segment_lora", "segment_lora_backward"),
    ),
)
