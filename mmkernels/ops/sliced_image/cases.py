"""Packed slices as data: the attention and the layer of a tower, and what else users write: padding, a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.sliced_image import cases_rows, cases_tokens
from mmkernels.ops.sliced_image.attention import slice_attention
from mmkernels.ops.sliced_image.cases_shared import BF16, F16, F32, F64, UHD, a_test, drawer, slices_of
from mmkernels.ops.sliced_image.slices import slice_offsets
from mmkernels.primitives._case import Case, Cost, Inputs, Room

_SIZES: dict[str, Any] = {
    "part": "attention", "slices": ((2, 3), (1, 1), (4, 2)), "prefix": 0, "heads": 2, "width": 8, "hidden": 24,
}  # fmt: skip
_WEIGHTS = ("w_qkv", "b_qkv", "w_out", "b_out", "w_up", "b_up", "w_down", "b_down")


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """`part` is "attention" (q, k, v as one product gave them) or "layer"; heads of `width` channels."""
    z = _SIZES | sizes
    draw, (hw, _) = drawer(seed, dtype, device), slices_of(z["slices"], device)
    lengths = [h * w + z["prefix"] for h, w in z["slices"]]
    c, f = z["heads"] * z["width"], z["hidden"]
    layer = z["part"] == "layer"
    x: Inputs = {"part": z["part"], "heads": z["heads"], "lengths": lengths}
    x["offsets"] = slice_offsets(hw, z["prefix"])
    x["x"] = draw(sum(lengths), c if layer else 3 * c)
    shapes = {"w_qkv": (3 * c, c), "w_out": (c, c), "w_up": (f, c), "w_down": (c, f)}
    for name in _WEIGHTS:
        shape = shapes.get(name) or shapes["w" + name[1:]][:1]
        x[name] = draw(*shape, scale=shape[-1] ** -0.5) if layer else None
    return x


Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(x: Inputs, rows: Tensor, core: Core) -> Tensor:
    """The part over rows [..., T, C]; `core` takes and gives [..., T, H, D]."""

    def attention(qkv: Tensor) -> Tensor:
        return core(*qkv.unflatten(-1, (3, x["heads"], -1)).unbind(-3)).flatten(-2)

    if x["part"] == "attention":
        return attention(rows)
    c = rows.shape[-1:]
    qkv = F.linear(F.layer_norm(rows, c), x["w_qkv"], x["b_qkv"])
    rows = rows + F.linear(attention(qkv), x["w_out"], x["b_out"])
    h = F.gelu(F.linear(F.layer_norm(rows, c), x["w_up"], x["b_up"]))
    return rows + F.linear(h, x["w_down"], x["b_down"])


def call(x: Inputs) -> Tensor:
    return run(x, x["x"], lambda q, k, v: slice_attention(q, k, v, x["offsets"]))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[..., T, H, D], heads apart."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2)


def eager(x: Inputs) -> Callable[[], Tensor]:
    """As published: every slice padded to the longest, one batch, a mask over the keys; padding falls out at the end."""
    lengths = torch.tensor(x["lengths"], device=x["x"].device)
    longest = max(x["lengths"], default=0)
    real = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
    place = real.flatten().nonzero().squeeze(1)
    mask = (real | ~real.any(1, keepdim=True))[:, None, None]

    def go() -> Tensor:
        rows = x["x"].new_zeros(len(lengths) * longest, x["x"].shape[1]).index_copy(0, place, x["x"])
        rows = rows.view(len(lengths), longest, x["x"].shape[1])
        return run(x, rows, lambda q, k, v: _sdpa(q, k, v, mask)).flatten(0, 1)[place]

    return go


def loop(x: Inputs) -> Callable[[], Tensor]:
    """One slice at a time."""

    def go() -> Tensor:
        parts = x["x"].split(x["lengths"])
        return torch.cat([run(x, part.unsqueeze(0), _sdpa).squeeze(0) for part in parts])

    return go


def cost(x: Inputs) -> Cost:
    rows, squares = sum(x["lengths"]), sum(n * n for n in x["lengths"])
    c = x["x"].shape[1] if x["part"] == "layer" else x["x"].shape[1] // 3
    weights = sum(x[name].numel() for name in _WEIGHTS if x[name] is not None)
    moved = rows * (x["x"].shape[1] + c) + weights
    return Cost(
        flops=4.0 * squares * c + 2.0 * rows * weights,
        bytes=float(moved * x["x"].element_size()),
        backward=2.2,
    )


TESTS = (
    a_test("uneven", F32, BF16, F16, F64),
    a_test("layer", prefix=1, part="layer"),
    a_test("class-token", prefix=1, slices=((3, 5), (9, 8), (1, 4)), width=16),
    a_test("alike", slices=((5, 4),) * 4),
    a_test("empty-slices", slices=((0, 0), (3, 3), (0, 5), (2, 1), (0, 0))),
    a_test("wide-head", slices=((7, 11), (2, 2)), width=72, heads=1),
    a_test("one-row", slices=((1, 1),)),
)

QWEN2 = ((8, 8), (16, 16), (24, 24), (32, 32), (20, 30), (48, 64), (64, 64))  # 64 to 4096 patches
MONKEY = ((32, 32),) * 5


def _bench(name: str, headline: bool = False, **sizes: Any) -> Case:
    z = {"slices": UHD, "heads": 16, "width": 64, "hidden": 4096} | sizes
    return Case(name, z, (F32, BF16), ("fwd", "fwd+bwd"), headline)


BENCH = (
    _bench("uhd-7slice", headline=True, part="layer", prefix=1),
    _bench("uhd-7slice-attention", prefix=1),
    _bench("qwen2-mix", headline=True, part="layer", heads=4, width=80, hidden=1280, slices=QWEN2),
    _bench("monkey-5windows-attention", slices=MONKEY, width=104),
)

ROOMS = (
    Room(
        name="sliced_image",
        make=make,
        call=call,
        differentiable=("x", *_WEIGHTS),
        tests=TESTS,
        bench=BENCH,
        cost=cost,
        peers={"eager": eager, "loop": loop},
        ops=("slice_attention", "slice_attention_backward"),
    ),
    *cases_rows.ROOMS,
    *cases_tokens.ROOMS,
)
