"""Grouped linear as data: its inputs, the shapes tested and timed, and what published code writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives._case import Case, Cost, Inputs, Room, generator, uneven_boundaries
from mmkernels.primitives.grouped_linear import reference
from mmkernels.primitives.grouped_linear.op import grouped_linear, out_width

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

_SIZES: dict[str, Any] = {
    "rows": 13, "groups": 3, "channels": 12, "width": 10, "split": "uneven", "moved": True, "shared": False, "bias": False,
    "activation": None, "row_scale": False, "residual": "", "lora": 0, "segments": 2, "top": 1, "dropped": 0, "spare": 0,
}  # fmt: skip


def _split(z: dict[str, Any]) -> Tensor:
    """The group of each of `rows` rows (the group number `groups`: none)."""
    rows, groups = z["rows"], z["groups"]
    at = torch.arange(rows)
    if z["split"] == "uneven":
        starts = torch.tensor(uneven_boundaries(rows, groups) if rows else [0])
        return (at.unsqueeze(1) >= starts).sum(1) % (
            groups + 1
        )  # the prefix comes first: no group's rows are all together
    if z["split"] == "one":  # all rows in the last group
        return torch.full((rows,), groups - 1)
    if z["split"] == "none":
        return torch.full((rows,), groups)
    if z["split"] == "sparse":  # most groups are empty
        return (at % 4) * (groups // 4) + groups // 4 - 1
    if isinstance(z["split"], tuple):  # (start, length): one image's run in the text, groups 1 and 0
        start, length = z["split"]
        return ((at >= start) & (at < start + length)).long()
    return (at * 7 + 3) % groups  # mixed


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """Rows that are read and written back in their places (`moved`), or that stand in group order already. With `top` > 1
    every row of x is gathered so many times, with `dropped` some rows are scattered nowhere, with `spare` out is longer."""
    z, random = _SIZES | sizes, generator(seed, device)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    ids = _split(z | {"rows": z["rows"] * z["top"]})
    order = torch.sort(ids, stable=True).indices
    counts = torch.bincount(ids, minlength=z["groups"] + 1)[: z["groups"]]
    used, m, k = int(counts.sum()), len(ids), z["lora"]
    scatter = torch.where(torch.arange(m) < used, order, -1)
    scatter[: z["dropped"]] = -1
    e = 1 if z["shared"] else z["groups"]
    n, c, s = z["width"], z["channels"], z["segments"]
    x = draw(z["rows"], c)
    weight = draw(e, n, c, scale=c**-0.5)
    wide = out_width(weight, z["activation"] or "")
    lora = (draw(s, k, c, scale=c**-0.5), draw(s, n, k, scale=k**-0.5)) if k else (None, None)
    segments = torch.tensor([m // (s + 1) * (i % 2) * 2 for i in range(s)], dtype=torch.int32)
    residual = draw(m + z["spare"], wide)
    return {
        "x": x,
        "weight": weight,
        "counts": counts.to(device, torch.int32),
        "gather": (order // z["top"]).to(device, torch.int32) if z["moved"] else None,
        "scatter": scatter.to(device, torch.int32) if z["moved"] else None,
        "bias": draw(e, n) if z["bias"] else None,
        "row_scale": torch.rand(m, generator=random, device=device).to(dtype) if z["row_scale"] else None,
        "residual": (residual.to(torch.promote_types(dtype, F32)) if z["residual"] == "wide" else residual)
        if z["residual"]
        else None,
        "lora_a": lora[0],
        "lora_b": lora[1],
        "lora_counts": segments.to(device) if k else None,
        "activation": z["activation"],
        "rows": m + z["spare"],
    }


def call(x: Inputs) -> Tensor:
    lora = None if x["lora_a"] is None else (x["lora_a"], x["lora_b"], x["lora_counts"])
    names = ("gather", "scatter", "bias", "activation", "row_scale", "residual", "rows")
    return grouped_linear(x["x"], x["weight"], x["counts"], lora=lora, **{name: x[name] for name in names})


class Plain:
    """The inputs as masks and lists on the host, which published code reads back in every layer."""

    def __init__(self, x: Inputs) -> None:
        x = x | {"counts": x["counts"].sum(0, keepdim=True)} if len(x["weight"]) == 1 else x
        self.at = reference._rows(x["x"], x["counts"], x["gather"], x["scatter"], x["rows"])
        self.keep = self.at.group < len(x["weight"])
        self.read, self.write = self.at.read[self.keep], self.at.write[self.keep]
        self.sizes = torch.bincount(self.at.group, minlength=len(x["weight"]) + 1)[:-1].tolist()
        self.group = self.at.group[self.keep]
        self.segment = None
        if x["lora_counts"] is not None:
            self.segment = reference._owner(x["lora_counts"], len(self.keep))[self.keep]

    def lora(self, x: Inputs, a: Tensor) -> Tensor | float:
        if self.segment is None:
            return 0.0
        found = [
            (a[self.segment == s] @ x["lora_a"][s].T) @ x["lora_b"][s].T for s in range(len(x["lora_a"]))
        ]
        return torch.cat([*found, a.new_zeros(int((self.segment >= len(found)).sum()), found[0].shape[1])])

    def finish(self, x: Inputs, a: Tensor, h: Tensor) -> Tensor:
        """From the products of the kept rows to the output."""
        h = h if x["bias"] is None else h + x["bias"][self.group]
        v = reference.activate(h + self.lora(x, a), x["activation"] or "")
        v = v if x["row_scale"] is None else v * x["row_scale"][self.keep].unsqueeze(1)
        if x["residual"] is not None:
            v = v + x["residual"][self.write]
        return v.new_zeros(x["rows"], v.shape[1]).index_put((self.write,), v)


def eager(x: Inputs) -> Callable[[], Tensor]:
    """As CogVLM's published code: a boolean mask for each group, one gather, one product and one scatter for each."""
    plain = Plain(x)

    def run() -> Tensor:
        a = x["x"][plain.read]
        h = a.new_empty(len(a), x["weight"].shape[1])
        for e, weight in enumerate(x["weight"]):
            own = plain.group == e
            h = h.index_put((own,), a[own] @ weight.T)
        return plain.finish(x, a, h)

    return run


def cost(x: Inputs) -> Cost:
    plain, (_, n, c) = Plain(x), x["weight"].shape
    used = sum(plain.sizes)
    sets = sum(size > 0 for size in plain.sizes)
    moved = (used * c + sets * n * c + used * out_width(x["weight"], x["activation"] or "")) * x[
        "x"
    ].element_size()
    return Cost(flops=2.0 * used * n * c, bytes=float(moved), backward=2.0)


def _test(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


TESTS = (
    _test("uneven", F32, BF16, F16, F64, bias=True, activation="swiglu"),
    _test("plain", F32, BF16, F16, F64, groups=2),
    _test(
        "everything", F32, BF16, F16, bias=True, activation="gelu", row_scale=True, residual="same", lora=3
    ),
    _test("top-2", F32, BF16, F16, top=2, split="mixed", row_scale=True),
    *(
        _test(name, activation=name, row_scale=True)
        for name in ("gelu", "gelu_tanh", "silu", "quick_gelu", "swiglu")
    ),
    _test("in-order", moved=False, split="one", groups=1),
    _test("in-order-bias", moved=False, split="sparse", groups=4, rows=4, bias=True, residual="same"),
    _test("tail-of-no-group", split="uneven", rows=29, bias=True, residual="wide"),
    _test(
        "dropped",
        F32,
        BF16,
        F16,
        dropped=4,
        spare=3,
        bias=True,
        residual="same",
        activation="silu",
        row_scale=True,
    ),
    _test("top-3-dropped", top=3, dropped=5, split="mixed", bias=True, lora=2),
    _test("all-in-one-group", split="one", groups=3, bias=True),
    _test("rows-of-no-group-only", split="none", bias=True, residual="same"),
    _test("no-rows", rows=0, bias=True, activation="swiglu", residual="same", row_scale=True, lora=2),
    _test("one-row", rows=1, split="mixed", groups=2),
    _test("shared", shared=True, bias=True, lora=5, segments=4, activation="quick_gelu"),
    _test("lora-segments", groups=1, split="one", rows=50, lora=16, segments=6, moved=False),
    _test("wide-residual", F32, BF16, F16, residual="wide", row_scale=True, split="mixed"),
    _test("60-groups-few-used", groups=60, rows=8, channels=8, width=6, split="sparse", bias=True),
    _test("100-groups", groups=100, rows=150, channels=8, width=9, split="mixed", bias=True),
    _test("512-groups", groups=512, rows=8, channels=5, width=6, split="sparse"),
    _test(
        "large-rows", F32, BF16, F16, rows=300, groups=2, channels=40, width=48, split=(20, 257), bias=True
    ),
    _test(
        "large",
        F32,
        BF16,
        F16,
        rows=150,
        channels=67,
        width=94,
        split="mixed",
        activation="swiglu",
        bias=True,
        row_scale=True,
    ),
    _test("decode", F32, BF16, F16, rows=7, groups=2, channels=130, width=71, split="mixed", bias=True),
    _test("decode-deep", F32, BF16, F16, rows=21, groups=1, channels=2300, width=7, split="one", moved=False),
)


def _bench(name: str, rows: int, channels: int, width: int, headline: bool = False, **more: Any) -> Case:
    z = {"rows": rows, "channels": channels, "width": width, "groups": 2} | more
    return Case(name, z, (F32, BF16), ("fwd",) if rows <= 16 else ("fwd", "fwd+bwd"), headline)


BENCH = (
    _bench("cogvlm-224-b1", 321, 2048, 6144, headline=True, split=(1, 257)),
    _bench("cogvlm-224-b1-4096", 321, 4096, 4096, split=(1, 257)),
    _bench("cogvlm-490-b1", 1291, 2048, 2048, split=(1, 1227)),
    _bench("cogvlm-490-b1-4096", 1291, 4096, 4096, split=(1, 1227)),
    _bench("cogvlm-224-mlp", 321, 2048, 8192, split=(1, 257), activation="swiglu"),
    _bench("cogvlm-decode-1", 1, 2048, 6144, headline=True, split="one"),
    _bench("cogvlm-decode-1-4096", 1, 4096, 12288, split="one"),
    _bench("cogvlm-decode-2-mlp", 2, 2048, 11008, split="one", activation="swiglu"),
    _bench("cogvlm-decode-4", 4, 2048, 6144, split="one"),
    _bench("cogvlm-decode-8-both", 8, 2048, 6144, split="mixed"),
    _bench("cogvlm-decode-16", 16, 2048, 6144, split="one"),
    _bench("moe-llava-T640", 640, 1024, 2816, groups=4, top=2, split="mixed", activation="swiglu"),
    _bench("moe-llava-T8", 8, 1024, 2816, groups=4, top=2, split="mixed", activation="swiglu"),
    _bench("moe-512-experts", 512, 256, 256, groups=512, top=2, split="mixed"),
    _bench("moe-64-experts", 256, 512, 768, groups=64, top=2, split="mixed"),
    _bench("monkey-lora", 1024, 1024, 1024, groups=1, split="one", moved=False, lora=16, segments=4),
)

ROOMS = (
    Room(
        name="grouped_linear",
        make=make,
        call=call,
        differentiable=("x", "weight", "bias", "row_scale", "residual", "lora_a", "lora_b"),
        tests=TESTS,
        bench=BENCH,
        cost=cost,
        peers={"eager": eager},
        ops=("grouped_linear", "grouped_linear_backward"),
    ),
)
