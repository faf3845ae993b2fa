"""The two halves of Flamingo's gated block as data: inputs, the shapes tested and timed, and what their users write today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.gated_cross_attention.feed_forward import gated_feed_forward
from mmkernels.ops.gated_cross_attention.media import media_intervals
from mmkernels.ops.gated_cross_attention.op import gated_cross_attention
from mmkernels.primitives._case import Case, Cost, Inputs, Peer, Room, generator, uneven_boundaries
from mmkernels.primitives._visible import Core, Visible, covered, eager_core, visible

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

_NORM: dict[str, Any] = {"norm": "layer", "bias": True, "gate": "scalar", "wide_x": False}


def _shared(z: dict[str, Any], dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    """Norm and gate; with `wide_x` they and x stay float32 beside lower weights, as autocast keeps the residual stream."""
    wide = torch.promote_types(dtype, F32) if z["wide_x"] else dtype
    channels = z["channels"] if z["gate"] == "channel" else 1
    return {
        "x": draw(z["batch"], z["rows"], z["channels"]).to(wide),
        "norm_weight": (1 + 0.1 * draw(z["channels"])).to(wide),
        "norm_bias": draw(z["channels"]).to(wide) if z["bias"] else None,
        "gate": (0.5 + 0.2 * draw(channels)).to(wide),
        "norm": z["norm"],
    }


def _draw(seed: int, device: str) -> Callable[..., Tensor]:
    random = generator(seed, device)
    return lambda *shape: torch.randn(shape, generator=random, device=device)


_CROSS = _NORM | {
    "batch": 1, "rows": 11, "images": 3, "latents": 4, "channels": 24, "heads": 2, "groups": None, "width": 8,
    "media_mode": "last", "surplus": 0, "cached": False, "attend_previous": True,
}  # fmt: skip


def make_cross(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """Text with `images + surplus` media tokens at uneven places, flat keys of all samples; `cached` is a decoding step."""
    z = _CROSS | sizes
    draw, tokens = _draw(seed, device), z["rows"] if not z["cached"] else 4 * (z["images"] + 1)
    locations = torch.zeros(z["batch"], tokens, dtype=torch.bool)
    for sample in range(z["batch"]):
        for start in uneven_boundaries(tokens, z["images"] + z["surplus"]):
            locations[sample, (start + sample) % tokens] = True
    rules = {"num_media": z["images"], "media_mode": z["media_mode"], "use_cached_media": z["cached"]}
    seen = media_intervals(
        locations.to(device), z["latents"], rows=z["rows"], attend_previous=z["attend_previous"], **rules
    )
    keys, inner = z["batch"] * z["images"] * z["latents"], z["heads"] * z["width"]
    media = (keys, z["groups"] or z["heads"], z["width"])
    return _shared(z, dtype, draw) | {
        "k": draw(*media).to(dtype),
        "v": draw(*media).to(dtype),
        "w_q": (draw(inner, z["channels"]) * z["channels"] ** -0.5).to(dtype),
        "w_o": (draw(z["channels"], inner) * inner**-0.5).to(dtype),
        **seen._asdict(),
        "heads": z["heads"],
        "batch": z["batch"],
    }


def call_cross(x: Inputs) -> Tensor:
    names = ("norm_weight", "norm_bias", "w_q", "w_o", "gate", "heads", "uniform", "norm")
    return gated_cross_attention(
        x["x"], x["k"], x["v"], x["lo"], x["hi"], **{name: x[name] for name in names}
    )


def _normed(x: Inputs) -> Tensor:
    rows, weight = x["x"], x["norm_weight"]
    if x["norm"] == "rms":
        unit = F.rms_norm(rows, weight.shape, weight, 1e-5)
        return unit if x["norm_bias"] is None else unit + x["norm_bias"]
    return F.layer_norm(rows, weight.shape, weight, x["norm_bias"], 1e-5)


def block(prepare: Callable[[Visible], Core]) -> Peer:
    """The published block around an attention core: norm, projection, attention, projection, gate and sum, one by one."""

    def peer(x: Inputs) -> Callable[[], Tensor]:
        core = prepare(visible(x))

        def run() -> Tensor:
            q = F.linear(_normed(x).to(x["w_q"].dtype), x["w_q"]).unflatten(-1, (x["heads"], -1))
            k, v = (x[name].unflatten(0, (x["batch"], -1)) for name in "kv")
            return x["x"] + torch.tanh(x["gate"]) * F.linear(core(q, k, v).flatten(2), x["w_o"])

        return run

    return peer


def cost_cross(x: Inputs) -> Cost:
    see, heads_width = visible(x), x["w_q"].shape[0]
    linear = 4.0 * x["x"].numel() * heads_width
    core = 4.0 * int((see.hi - see.lo).clamp(min=0).sum()) * heads_width
    media = 2 * covered(see) * x["k"].shape[1] * x["k"].shape[2] + 2 * x["w_q"].numel()
    moved = 2 * x["x"].numel() * x["x"].element_size() + media * x["k"].element_size()
    return Cost(linear + core, moved, backward=(2 * linear + 2.5 * core) / max(linear + core, 1))


def _cross(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


CROSS_TESTS = (
    _cross("uneven", F32, BF16, F16, F64),
    _cross("batch", batch=3),
    _cross("grouped", heads=4, groups=2),
    _cross("overflow", surplus=2),
    _cross("overflow-batch", batch=2, surplus=3, heads=4, groups=1),
    _cross("all-previous", batch=2, media_mode="all_previous"),
    _cross("next-image", batch=2, attend_previous=False),
    _cross("cached", batch=3, rows=1, cached=True),
    _cross("no-image", images=0, surplus=2),
    _cross("rms", norm="rms", bias=False),
    _cross("layer-norm-without-bias", bias=False),
    _cross("rms-with-bias", norm="rms"),
    _cross("channel-gate", gate="channel"),
    _cross("autocast", BF16, F16, wide_x=True, batch=2),
    _cross("autocast-rms-channel", BF16, F16, wide_x=True, norm="rms", bias=False, gate="channel"),
    _cross("width-64", width=64, latents=16, channels=40),
    _cross("width-88", width=88, latents=16, channels=40),
    _cross("width-20", F32, BF16, F64, width=20),  # compiled kernels refuse it
    _cross("many-tiles", rows=150, images=4, latents=64, channels=72),
    _cross("no-rows", rows=0, images=0),
)


def _flamingo(name: str, *sizes: int, headline: bool = False, **more: Any) -> Case:
    """`sizes` are (batch, text rows, images, channels); OpenFlamingo has 8 heads of 64 and 64 latents an image."""
    batch, rows, images, channels = sizes
    z = {
        "batch": batch,
        "rows": rows,
        "images": images,
        "channels": channels,
        "heads": 8,
        "width": 64,
        "latents": 64,
    }
    return Case(name, z | more, (F32, BF16), ("fwd",) if rows == 1 else ("fwd", "fwd+bwd"), headline)


CROSS_BENCH = (
    _flamingo("F3B-long", 1, 2048, 16, 2048, headline=True),
    _flamingo("F3B-train", 8, 512, 4, 2048),
    _flamingo("F3B-overflow", 1, 2048, 16, 2048, surplus=2),
    _flamingo("F9B-train-b1", 1, 2048, 5, 4096),
    _flamingo("F9B-train", 8, 2048, 5, 4096),
    _flamingo("F9B-prefill", 1, 2048, 16, 4096),
    _flamingo("F9B-decode", 32, 1, 8, 4096, cached=True),
)


_FEED = _NORM | {"batch": 1, "rows": 7, "channels": 16, "hidden": 24, "activation": "gelu"}


def make_feed(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z = _FEED | sizes
    draw, c, n = _draw(seed, device), z["channels"], z["hidden"]
    return _shared(z, dtype, draw) | {
        "w_in": (draw(2 * n if z["activation"] == "swiglu" else n, c) * c**-0.5).to(dtype),
        "w_out": (draw(c, n) * n**-0.5).to(dtype),
        "activation": z["activation"],
    }


def call_feed(x: Inputs) -> Tensor:
    return gated_feed_forward(x["x"], **{name: value for name, value in x.items() if name != "x"})


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "gelu":
        return F.gelu(h)
    return F.relu(h) if activation == "relu" else F.relu(h).square()


def eager_feed(x: Inputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        h = F.linear(_normed(x).to(x["w_in"].dtype), x["w_in"])
        return x["x"] + torch.tanh(x["gate"]) * F.linear(_activate(h, x["activation"]), x["w_out"])

    return run


def cost_feed(x: Inputs) -> Cost:
    rows, weights = x["x"].numel() // max(x["x"].shape[-1], 1), x["w_in"].numel() + x["w_out"].numel()
    moved = 2 * x["x"].numel() * x["x"].element_size() + weights * x["w_in"].element_size()
    return Cost(2.0 * rows * weights, moved, backward=2.0)


def _feed(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


FEED_TESTS = (
    _feed("plain", F32, BF16, F16, F64),
    *(_feed(name, F32, BF16, F16, activation=name) for name in ("relu", "squared_relu", "swiglu")),
    _feed("rms-swiglu", norm="rms", bias=False, activation="swiglu", gate="channel"),
    _feed("channel-gate", gate="channel", batch=2),
    _feed("layer-norm-without-bias", bias=False),
    _feed("autocast", BF16, F16, wide_x=True),
    _feed("autocast-swiglu", BF16, F16, wide_x=True, activation="swiglu", norm="rms", bias=False),
    _feed("odd-sizes", rows=13, channels=37, hidden=51, activation="swiglu"),
    _feed("large", rows=70, channels=96, hidden=200),
    _feed("no-rows", rows=0),
)


def _block(name: str, rows: int, channels: int, headline: bool = False, **more: Any) -> Case:
    z = {"rows": rows, "channels": channels, "hidden": 4 * channels} | more
    return Case(name, z, (F32, BF16), ("fwd",) if rows <= 32 else ("fwd", "fwd+bwd"), headline)


FEED_BENCH = (
    _block("F3B-feed-b1", 512, 2048, headline=True),
    _block("F3B-feed-train", 4096, 2048),
    _block("idefics-feed", 256, 2048, activation="swiglu", norm="rms", bias=False),
    _block("F3B-feed-decode", 32, 2048),
)

_WEIGHTS = ("norm_weight", "norm_bias", "gate")

ROOMS = (
    Room(
        name="gated_cross_attention",
        make=make_cross,
        call=call_cross,
        differentiable=("x", "k", "v", "w_q", "w_o", *_WEIGHTS),
        tests=CROSS_TESTS,
        bench=CROSS_BENCH,
        cost=cost_cross,
        peers={"eager": block(eager_core)},
        ops=("gated_cross_attention", "gated_cross_attention_backward"),
    ),
    Room(
        name="gated_feed_forward",
        make=make_feed,
        call=call_feed,
        differentiable=("x", "w_in", "w_out", *_WEIGHTS),
        tests=FEED_TESTS,
        bench=FEED_BENCH,
        cost=cost_feed,
        peers={"eager": eager_feed},
        ops=("gated_feed_forward", "gated_feed_forward_backward"),
    ),
)
