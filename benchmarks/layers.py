"""Whole layers as rooms: what the ops are worth beside the norms, the attention and the sums around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.layers import VisualExpertBlock, expert_mask, image_positions, rotary_table
from mmkernels.primitives._case import Case, Cost, Inputs, Room, generator

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


@functools.cache
def _block(width: int, heads: int, hidden: int) -> VisualExpertBlock:
    with torch.device("meta"):
        return VisualExpertBlock(width, heads, hidden, eps=EPS)


def make(
    seed: int,
    dtype: torch.dtype,
    device: str,
    *,
    tokens: int,
    image: int,
    width: int,
    heads: int,
    hidden: int,
) -> Inputs:
    """One text with an image of `image` tokens after its first; parameters are inputs, under the block's own names."""
    random = generator(seed, device)
    types = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    types[:, 1 : 1 + image] = 1
    x: Inputs = {"types": types, "positions": image_positions(types), "sizes": (width, heads, hidden)}
    x["x"] = torch.randn(1, tokens, width, generator=random, device=device).to(dtype)
    for name, parameter in _block(width, heads, hidden).named_parameters():
        value = torch.randn(parameter.shape, generator=random, device=device)
        x[name] = (value * parameter.shape[-1] ** -0.5 if value.dim() == 2 else 1 + value / 8).to(dtype)
    return x


def call(x: Inputs) -> Tensor:
    block = _block(*x["sizes"])
    parameters = {name: x[name] for name, _ in block.named_parameters()}
    return torch.func.functional_call(block, parameters, (x["x"], x["types"], x["positions"]))


def eager(x: Inputs) -> Callable[[], Tensor]:
    """The published layer: boolean gathers and scatters around every expert, torch's own attention."""
    width, heads, _ = x["sizes"]
    vision = expert_mask(x["types"])
    dtype = x["x"].dtype
    wide = torch.promote_types(dtype, F32)
    cos, sin = (
        torch.cat([t.to(dtype)] * 2, -1) for t in rotary_table(x["positions"], width // heads, 1e4, wide)
    )

    def norm(t: Tensor, name: str) -> Tensor:
        return F.rms_norm(t, (width,), x[f"{name}.weight"], EPS)

    def choose(t: Tensor, of: Callable[[Tensor, str], Tensor], outs: int) -> Tensor:
        y = t.new_empty(*t.shape[:-1], outs)
        y[vision] = of(t[vision], "vision")
        y[~vision] = of(t[~vision], "text")
        return y

    def linear(t: Tensor, of: str, outs: int) -> Tensor:
        return choose(t, lambda rows, name: F.linear(rows, x[f"attention.{of}.{name}.weight"]), outs)

    def mlp(t: Tensor, name: str) -> Tensor:
        gate, up = x[f"mlp.up.{name}.weight"].chunk(2)
        return F.linear(F.silu(F.linear(t, gate)) * F.linear(t, up), x[f"mlp.down.{name}.weight"])

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    def run() -> Tensor:
        qkv = linear(norm(x["x"], "attention_norm"), "qkv", 3 * width)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in qkv.chunk(3, -1))
        q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = x["x"] + linear(o, "out", width)
        return h + choose(norm(h, "mlp_norm"), mlp, width)

    return run


def cost(x: Inputs) -> Cost:
    rows, (width, _, hidden) = x["x"].shape[1], x["sizes"]
    weights = 4 * width**2 + 3 * width * hidden
    size, sets = x["x"].element_size(), 1 + bool(x["types"].any())
    return Cost(
        2.0 * rows * weights + 2.0 * rows**2 * width,
        float(size * (sets * weights + 2 * rows * width)),
        backward=2.0,
    )


def _bench(name: str, tokens: int, image: int, dtypes: tuple[torch.dtype, ...] = (F32, BF16)) -> Case:
    z: dict[str, Any] = {"width": 1024, "heads": 8, "hidden": 2752, "tokens": tokens, "image": image}
    return Case(name, z, dtypes)


ROOMS = (
    Room(
        name="visual_expert_block",
        make=make,
        call=call,
        differentiable=("x", *(name for name, _ in _block(8, 1, 8).named_parameters())),
        tests=(),
        bench=(
            _bench("cogvlm-layer-224", 321, 258),
            _bench("cogvlm-layer-490", 1291, 1227),
            _bench("cogvlm-layer-text", 321, 0),
        ),
        cost=cost,
        peers={"eager": eager},
        ops=("modality_linear", "modality_linear_backward"),
    ),
)
