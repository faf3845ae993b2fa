"""Interval attention as data: its inputs, the shapes tested and timed, and what its users write today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._case import Case, Cost, Inputs, Peer, Room, generator
from mmkernels.primitives._visible import Core, Visible, covered, eager_core, intervals, visible
from mmkernels.primitives.interval_attention.op import interval_attention

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

_SIZES: dict[str, Any] = {
    "batch": 1, "rows": 13, "keys": 24, "heads": 4, "groups": None, "width": 16, "mask": "uneven", "parts": 3,
    "overflow": 0, "alibi": False, "dropout": 0.0, "strided": False,
}  # fmt: skip


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """Flat inputs [B T,H,D], or with `strided` the 4-D form [B,H,T,D] as views; the last `overflow` rows are uniform."""
    z = _SIZES | sizes
    random, batch, rows, keys = generator(seed, device), z["batch"], z["rows"], z["keys"]

    def draw(tokens: int, heads: int) -> Tensor:
        x = torch.randn(batch, tokens, heads, z["width"], generator=random, device=device).to(dtype)
        return x.transpose(1, 2) if z["strided"] else x.flatten(0, 1)

    lo, hi, uniform = intervals(z)
    if not z["strided"]:
        offset = torch.arange(batch).unsqueeze(1) * keys
        lo, hi, uniform = (lo + offset).flatten(), (hi + offset).flatten(), uniform.flatten()
    slopes = 2.0 ** -torch.arange(1.0, z["heads"] + 1, device=device) if z["alibi"] else None
    return {
        "q": draw(rows, z["heads"]),
        "k": draw(keys, z["groups"] or z["heads"]),
        "v": draw(keys, z["groups"] or z["heads"]),
        "lo": lo.to(device, torch.int32),
        "hi": hi.to(device, torch.int32),
        "uniform": uniform.to(device) if z["overflow"] else None,
        "alibi_slopes": slopes,
        "dropout_p": z["dropout"],
        "seed": torch.tensor([0x1234_5678_9ABC + seed], device=device) if z["dropout"] else None,
        "batch": batch,
    }


def call(x: Inputs) -> Tensor:
    rules = {name: x[name] for name in ("uniform", "alibi_slopes", "dropout_p", "seed")}
    return interval_attention(x["q"], x["k"], x["v"], x["lo"], x["hi"], **rules)  # type: ignore[return-value]


def over(prepare: Callable[[Visible], Core]) -> Peer:
    """A peer of this room from an attention core."""

    def peer(x: Inputs) -> Callable[[], Tensor]:
        core, flat = prepare(visible(x)), x["q"].dim() == 3

        def run() -> Tensor:
            if flat:
                return core(*(x[n].unflatten(0, (x["batch"], -1)) for n in "qkv")).flatten(0, 1)
            return core(*(x[n].transpose(1, 2) for n in "qkv")).transpose(1, 2)

        return run

    return peer


def cost(x: Inputs) -> Cost:
    see, q, k = visible(x), x["q"], x["k"]
    heads = q.numel() // max(see.lo.numel(), 1)  # H D
    groups = k.numel() // max(see.keys * see.lo.shape[0], 1)  # G D
    pairs = int((see.hi - see.lo).clamp(min=0).sum())
    moved = (2 * q.numel() + 2 * covered(see) * groups) * q.element_size() + 8 * see.lo.numel()
    return Cost(flops=4.0 * pairs * heads, bytes=moved)


def _test(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


_WIDTHS = (8, 40, 64, 72, 80, 88, 96, 104, 112, 128, 256)

TESTS = (
    _test("uneven", F32, BF16, F16, F64),
    _test("even", mask="even", rows=12, heads=1),
    _test("causal", F32, BF16, F16, F64, mask="causal", rows=24, strided=True, batch=2),
    _test("grouped", batch=2, groups=2),
    _test("one-key-head", mask="causal", rows=24, groups=1),
    _test("all-previous", mask="all_previous"),
    _test("prefix", mask="prefix", rows=24),
    _test("window", mask="window", rows=24),
    _test("packed", mask="packed"),
    _test("dense", mask="dense", rows=5, batch=2, strided=True),
    _test("any-order", F32, BF16, F16, mask="any_order", rows=40, keys=37),
    _test("any-order-grouped", mask="any_order", rows=40, keys=37, batch=2, groups=2, strided=True),
    _test("many-tiles", mask="any_order", rows=150, keys=300, heads=2),
    _test("overflow", F32, BF16, F16, overflow=4),
    _test("all-uniform", overflow=13),
    _test("uniform-strided", batch=2, overflow=3, groups=2, strided=True),
    _test("alibi", mask="causal", rows=24, alibi=True),
    _test("alibi-any-order", mask="any_order", rows=20, alibi=True, groups=2, overflow=2),
    _test("dropout", F32, BF16, F16, mask="causal", rows=24, dropout=0.2),
    _test("dropout-strided", batch=2, dropout=0.5, groups=2, overflow=2, strided=True),
    _test("dropout-flat-batch", batch=3, dropout=0.1, alibi=True),
    _test("decode", batch=5, rows=1, mask="one_image", strided=True),
    _test("decode-flat", batch=5, rows=1, mask="one_image", groups=2),
    _test("nothing-seen", mask="nothing"),
    _test("one-row-one-key", rows=1, keys=1, parts=1, mask="dense"),
    _test("no-rows", rows=0, mask="dense"),
    _test("no-keys", keys=0, mask="dense"),
    _test("no-keys-uniform", keys=0, mask="dense", overflow=3),
    _test("no-batch", batch=0, mask="dense", strided=True),
    *(_test(f"width-{d}", rows=9, heads=2, groups=1, width=d) for d in _WIDTHS),
    _test("width-20", F32, BF16, F64, width=20),  # compiled kernels refuse it
)


def _bench(name: str, headline: bool = False, **sizes: Any) -> Case:
    passes = ("fwd",) if sizes["rows"] == 1 else ("fwd", "fwd+bwd")
    return Case(name, sizes, (F32, BF16), passes, headline)


def _flamingo(name: str, images: int = 16, headline: bool = False, **sizes: Any) -> Case:
    """2048 text rows, images of 64 latents, 8 heads of 64: one OpenFlamingo layer."""
    return _bench(
        name,
        headline,
        **{"rows": 2048, "keys": 64 * images, "parts": images, "heads": 8, "width": 64} | sizes,
    )


BENCH = (
    _flamingo("flamingo-core-uneven", headline=True),
    _flamingo("flamingo-core-even", mask="even"),
    _flamingo("flamingo-core-4img", images=4),
    _flamingo("flamingo-core-32img", images=32),
    _flamingo("flamingo-core-overflow", overflow=1),
    _flamingo("F3B-train-core", images=4, batch=8, rows=512, strided=True),
    _flamingo("F9B-decode-core", images=8, batch=32, rows=1, mask="one_image", strided=True),
    _bench("causal-lm", True, rows=2048, keys=2048, heads=8, groups=2, width=64, mask="causal", strided=True),
    _bench("perceiver-1img", rows=64, keys=320, heads=8, width=64, mask="dense", strided=True),
    _bench("perceiver-video", batch=4, rows=64, keys=2112, heads=8, width=64, mask="dense", strided=True),
)

ROOMS = (
    Room(
        name="interval_attention",
        make=make,
        call=call,
        differentiable=("q", "k", "v"),
        tests=TESTS,
        bench=BENCH,
        cost=cost,
        peers={"eager": over(eager_core)},
        ops=("interval_attention", "interval_attention_backward"),
    ),
)
