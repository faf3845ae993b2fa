"""The expert's maps as data: inputs, the shapes tested and timed, and what CogVLM's published code writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.visual_expert.masks import expert_mask
from mmkernels.ops.visual_expert.op import expert_mlp, expert_qkv, modality_linear
from mmkernels.primitives._case import Case, Cost, Inputs, Room, generator
from mmkernels.primitives.grouped_linear import reference as grouped

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

_SIZES: dict[str, Any] = {
    "part": "linear", "batch": 1, "rows": 13, "image": (2, 7), "channels": 12, "width": 10, "b_text": False, "b_vision": False,
    "activation": None, "residual": "", "heads": 3, "kv_heads": 1, "hidden": 9,
}  # fmt: skip


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """`batch` texts of `rows` tokens, `image` = (start, tokens) of them an image's, a token later in every next text.

    `part` is "linear", "qkv" (heads of `width` channels) or "mlp" (its middle `hidden` wide).
    """
    z, random = _SIZES | sizes, generator(seed, device)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    b, rows, c, n = z["batch"], z["rows"], z["channels"], z["width"]
    at = torch.arange(rows) - torch.arange(b).unsqueeze(1)
    start, length = z["image"]
    vision = expert_mask(((at >= start) & (at < start + length)).long()).flatten().to(device)
    heads = z["heads"], z["kv_heads"]
    outs = {"linear": n, "qkv": n * (heads[0] + 2 * heads[1]), "mlp": 2 * z["hidden"]}[z["part"]]
    x: Inputs = {"part": z["part"], "heads": heads, "activation": z["activation"], "is_vision": vision}
    x["x"] = draw(b * rows, c)
    for name in ("text", "vision"):
        x[f"w_{name}"] = draw(outs, c, scale=c**-0.5)
        x[f"b_{name}"] = draw(outs) if z[f"b_{name}"] else None
        x[f"down_{name}"] = draw(c, z["hidden"], scale=z["hidden"] ** -0.5) if z["part"] == "mlp" else None
    if z["part"] == "qkv":
        angles = 3 * torch.rand(b * rows, n // 2, generator=random, device=device)
        x |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    wide = torch.promote_types(dtype, F32) if z["residual"] == "wide" else dtype
    width = c if z["part"] == "mlp" else n // 2 if z["activation"] == "swiglu" else n
    x["residual"] = draw(b * rows, width).to(wide) if z["residual"] else None
    return x


def call(x: Inputs) -> Tensor:
    pair = (x["w_text"], x["w_vision"])
    if x["part"] == "mlp":
        downs = (x["down_text"], x["down_vision"])
        return expert_mlp(x["x"], x["is_vision"], pair, downs, residual=x["residual"])
    linear = (x["x"], x["is_vision"], *pair, x["b_text"], x["b_vision"])
    if x["part"] == "qkv":
        heads, kv_heads = x["heads"]
        q, k, v = expert_qkv(*linear, rotary=(x["cos"], x["sin"]), heads=heads, kv_heads=kv_heads)
        return torch.cat([q, k, v], 1).flatten(1)
    return modality_linear(*linear, activation=x["activation"], residual=x["residual"])


def turned(x: Inputs, qkv: Tensor) -> Tensor:
    """Rotary as published: the second half, negated, before the first, times the sine."""
    heads, kv_heads = x["heads"]
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    cos, sin = (torch.cat([x[name]] * 2, -1).unsqueeze(1) for name in ("cos", "sin"))

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    return torch.cat([turn(q), turn(k), v], 1).flatten(1)


def finish(x: Inputs, h: Tensor) -> Tensor:
    """From the products to the output of "linear" and "qkv"."""
    if x["part"] == "qkv":
        return turned(x, h)
    v = grouped.activate(h, x["activation"] or "")
    return v if x["residual"] is None else v + x["residual"]


def expert(x: Inputs, name: str) -> Callable[[Tensor], Tensor]:
    """One modality's map of the rows it is given."""
    weight, bias, down = x[f"w_{name}"], x[f"b_{name}"], x[f"down_{name}"]
    if x["part"] != "mlp":
        return lambda a: F.linear(a, weight, bias)
    gate, up = weight.chunk(2)
    return lambda a: F.linear(F.silu(F.linear(a, gate)) * F.linear(a, up), down)


def eager(x: Inputs) -> Callable[[], Tensor]:
    """As published: a boolean mask for each modality; for each a gather, its expert and a scatter."""
    vision, text = x["is_vision"], ~x["is_vision"]
    of_vision, of_text = expert(x, "vision"), expert(x, "text")
    mlp = x["part"] == "mlp"
    width = (x["down_text"] if mlp else x["w_text"]).shape[0]

    def run() -> Tensor:
        y = x["x"].new_empty(len(x["x"]), width)
        y[vision] = of_vision(x["x"][vision])
        y[text] = of_text(x["x"][text])
        if not mlp:
            return finish(x, y)
        return y if x["residual"] is None else y + x["residual"]

    return run


def cost(x: Inputs) -> Cost:
    rows, c = x["x"].shape
    vision = int(x["is_vision"].sum())
    sets = (vision > 0) + (vision < rows)
    weight = x["w_text"].numel() + (0 if x["down_text"] is None else x["down_text"].numel())
    out = c if x["part"] == "mlp" else x["w_text"].shape[0] // (2 if x["activation"] == "swiglu" else 1)
    moved = (rows * (c + out) + sets * weight) * x["x"].element_size()
    return Cost(flops=2.0 * rows * weight, bytes=float(moved), backward=2.0)


def _test(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


TESTS = (
    _test("uneven", F32, BF16, F16, F64, b_text=True, b_vision=True),
    _test("qkv", F32, BF16, F16, F64, part="qkv", b_vision=True, width=8),
    _test("mlp", F32, BF16, F16, F64, part="mlp", residual="same"),
    _test("swiglu", F32, BF16, F16, activation="swiglu", b_vision=True, residual="same"),
    _test("batch", batch=3, b_text=True, residual="wide"),
    _test("gelu", activation="gelu", b_text=True),
    _test("silu", activation="silu"),
    _test("quick-gelu", activation="quick_gelu", residual="wide"),
    _test("batch-qkv", batch=3, part="qkv", width=6, heads=4, kv_heads=2),
    _test("batch-mlp", batch=3, part="mlp", residual="wide"),
    _test("all-text", image=(0, 0), b_text=True, b_vision=True),
    _test("all-text-qkv", image=(0, 0), part="qkv", width=8, b_vision=True),
    _test("all-text-mlp", image=(0, 0), part="mlp"),
    _test("one-text", image=(0, 13), b_text=True),  # the last of a row is text's
    _test("one-vision", image=(3, 2), activation="swiglu"),
    _test("decode", rows=1, image=(0, 0), channels=70, width=33, b_text=True),
    _test("decode-mlp", rows=1, batch=4, image=(0, 0), part="mlp", channels=40, hidden=24, residual="same"),
    _test("many-qkv", F32, F16, rows=150, image=(1, 120), part="qkv", channels=40, width=16),
    _test("many-mlp", F32, BF16, F16, rows=150, image=(30, 101), part="mlp", channels=40, hidden=33, residual="same"),
    _test("no-rows", rows=0, image=(0, 0), b_text=True, residual="same"),
    _test("no-rows-mlp", rows=0, image=(0, 0), part="mlp"),
    _test("no-rows-qkv", rows=0, image=(0, 0), part="qkv", width=4),
)  # fmt: skip


def _bench(name: str, headline: bool = False, **sizes: Any) -> Case:
    z = {"rows": 321, "image": (1, 258), "channels": 2048, "width": 6144} | sizes
    return Case(name, z, (F32, BF16), ("fwd",) if z["rows"] == 1 else ("fwd", "fwd+bwd"), headline)


_QKV = {"part": "qkv", "width": 128, "heads": 16, "kv_heads": 16}
_MLP = {"part": "mlp", "hidden": 5504, "residual": "same"}
_ALONE = {"rows": 1, "image": (0, 0)}

BENCH = (
    _bench("cogvlm-224", headline=True),
    _bench("cogvlm-490", rows=1291, image=(1, 1227), width=2048),
    _bench("cogvlm-decode-1", headline=True, **_ALONE),
    _bench("cogvlm-decode-16", batch=16, **_ALONE),
    _bench("all-text", image=(0, 0)),
    _bench("cogvlm-224-qkv", **_QKV),
    _bench("cogvlm-224-mlp", **_MLP),
    _bench("cogvlm-decode-1-mlp", **_MLP, **_ALONE),
    _bench("cogvlm-decode-16-mlp", batch=16, **_MLP, **_ALONE),
)

ROOMS = (
    Room(
        name="visual_expert",
        make=make,
        call=call,
        differentiable=(
            "x", "w_text", "w_vision", "b_text", "b_vision", "down_text", "down_vision", "residual",
        ),
        tests=TESTS,
        bench=BENCH,
        cost=cost,
        peers={"eager": eager},
        ops=("modality_linear", "modality_linear_backward"),
    ),
)  # fmt: skip
