"""Mixtures of experts as data: inputs, the shapes tested and timed, and what published code writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.moe.op import moe_ffn
from mmkernels.ops.moe.route import Routing, moe_capacity, moe_route
from mmkernels.primitives._case import Case, Cost, Inputs, Room, generator
from mmkernels.primitives.grouped_linear.reference import activate

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

_SIZES: dict[str, Any] = {
    "tokens": 13, "experts": 4, "k": 2, "channels": 12, "hidden": 10, "activation": "swiglu", "bias": False,
    "policy": "dropless", "factor": None, "skew": 0.0, "noise": "", "padding": 0,
}  # fmt: skip


def _logits(z: dict[str, Any], random: torch.Generator, device: str) -> Tensor:
    """A share `skew` of the tokens prefers expert 0."""
    logits = torch.randn((z["tokens"], z["experts"]), generator=random, device=device)
    strong = torch.arange(z["tokens"], device=device) < z["skew"] * z["tokens"]
    return logits + 8.0 * strong.unsqueeze(1) * (torch.arange(z["experts"], device=device) == 0)


def _noise(z: dict[str, Any], random: torch.Generator, device: str) -> Tensor | None:
    if not z["noise"]:
        return None
    draw = torch.rand((z["tokens"], z["experts"]), generator=random, device=device)
    return draw if z["noise"] == "draw" else -torch.log(-torch.log(draw.clamp(1e-6, 1 - 1e-6)))


def _capacity(z: dict[str, Any]) -> int | None:
    if z["factor"] is None:
        return None
    return moe_capacity(z["tokens"], z["experts"], z["factor"], z["k"])


def make_route(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    z, random = _SIZES | sizes, generator(seed, device)
    mask = torch.arange(z["tokens"], device=device) < z["tokens"] - z["padding"] if z["padding"] else None
    rules = {name: z[name] for name in ("k", "policy")}
    logits = _logits(z, random, device).to(dtype)
    return {
        "logits": logits,
        "noise": _noise(z, random, device),
        "mask": mask,
        "capacity": _capacity(z),
    } | rules


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """The router is float32 whatever the experts are, as published."""
    z, random = _SIZES | sizes, generator(seed + 1, device)
    x = make_route(seed, torch.promote_types(dtype, F32), device, **sizes)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    e, c, f = z["experts"], z["channels"], z["hidden"]
    n = 2 * f if z["activation"] == "swiglu" else f
    x |= {"activation": z["activation"], "x": draw(z["tokens"], c)}
    x |= {"w_in": draw(e, n, c, scale=c**-0.5), "w_out": draw(e, c, f, scale=f**-0.5)}
    return x | {"b_in": draw(e, n) if z["bias"] else None, "b_out": draw(e, c) if z["bias"] else None}


def _route(x: Inputs) -> Routing:
    rules = {name: x[name] for name in ("capacity", "policy", "noise", "mask")}
    return moe_route(x["logits"], x["k"], **rules)


def call_route(x: Inputs) -> Tensor:
    routing = _route(x)
    return torch.cat([routing.weights.flatten(), routing.aux_loss.view(1), routing.z_loss.view(1)])


def call(x: Inputs) -> Tensor:
    """From the router's logits to the experts' sum."""
    rest = {name: x[name] for name in ("b_in", "b_out", "activation")}
    return moe_ffn(x["x"], _route(x), x["w_in"], x["w_out"], **rest)


class Gates(NamedTuple):
    """weights, experts, slots and whether a route is kept, all [T, K]; the auxiliary loss and the places of an expert."""

    weights: Tensor
    experts: Tensor
    slots: Tensor
    kept: Tensor
    aux: Tensor
    capacity: int


def gating(x: Inputs) -> Gates:
    """As DeepSpeed and transformers write it: dense masks, cumulative sums down the tokens."""
    logits, k, policy = x["logits"].float(), x["k"], x["policy"]
    e, capacity = logits.shape[1], x["capacity"]
    real = x["mask"]
    p = F.softmax(logits, 1)
    experts = _choices(x, p, logits)
    masks = F.one_hot(experts, e)
    used = masks if real is None else masks * real.view(-1, 1, 1)
    real_p = p if real is None or policy == "deepspeed_top1" else p * real.unsqueeze(1)
    count = len(p) if real is None or policy == "deepspeed_top1" else int(real.sum())
    share = real_p.sum(0) / max(count, 1)
    hits = used[:, :1] if policy in ("deepspeed_top1", "deepspeed_top2") else used
    over = count * (1 if policy in ("dropless", *_FIRST) else k)
    aux = e * (share * hits.sum((0, 1)) / max(over, 1)).sum()
    chosen = p.gather(1, experts)
    slots, kept = _slots(x, used, chosen)
    w = chosen if policy in ("dropless", "topk_capacity", "deepspeed_top1") else chosen * kept
    if policy != "deepspeed_top1":
        w = w / w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).eps)
    most = int(used.sum((0, 1)).max()) if capacity is None and len(p) else capacity or 0
    return Gates(w * kept, experts, slots, kept, aux, most)


_FIRST = ("deepspeed_top1", "deepspeed_top2")


def _choices(x: Inputs, p: Tensor, logits: Tensor) -> Tensor:
    if x["noise"] is None or x["policy"] == "deepspeed_top1":
        return p.topk(x["k"], dim=1).indices
    noisy = logits + x["noise"].float()
    if x["policy"] != "deepspeed_top2":
        return noisy.topk(x["k"], dim=1).indices
    first = p.argmax(1, keepdim=True)
    return torch.cat([first, noisy.scatter(1, first, -torch.inf).argmax(1, keepdim=True)], 1)


def _slots(x: Inputs, used: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places [T, K] in the experts' buffers, and who has one."""
    capacity, real = x["capacity"], used.sum(2) > 0
    if x["policy"] == "deepspeed_top2":
        before = F.pad(used.sum(0).cumsum(0)[:-1], (0, 0, 1, 0))
        slots = ((used.cumsum(0) - 1 + before) * used).sum(2)
        return slots, real & (slots < capacity) if capacity is not None else real
    mask = used.sum(1)
    if capacity is not None and (x["policy"] == "deepspeed_probs" or x["noise"] is not None):
        score = chosen if x["policy"] == "deepspeed_probs" else x["noise"].float().gather(1, used.argmax(2))
        dense = (used * score.unsqueeze(2)).sum(1)
        best = dense.topk(min(capacity, len(dense)), dim=0).indices
        mask = mask * torch.zeros_like(mask).scatter(0, best, 1)
    slots = mask.cumsum(0) - 1
    if capacity is not None:
        mask = mask * (slots < capacity)
    return (used * slots.unsqueeze(1)).sum(2), (used * mask.unsqueeze(1)).sum(2) > 0


def eager_route(x: Inputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        gates, real = gating(x), x["mask"]
        square = torch.logsumexp(x["logits"].float(), 1).square()
        square = square if real is None else square[real]
        z = square.mean() if len(square) else square.sum()
        return torch.cat([gates.weights.flatten(), gates.aux.view(1), z.view(1)])

    return run


def expert(x: Inputs, e: int, rows: Tensor) -> Tensor:
    b_in, b_out = (None if x[b] is None else x[b][e] for b in ("b_in", "b_out"))
    return F.linear(activate(F.linear(rows, x["w_in"][e], b_in), x["activation"] or ""), x["w_out"][e], b_out)


def eager(x: Inputs) -> Callable[[], Tensor]:
    """As Mixtral in transformers: for every expert that was hit its tokens, weighted after, added in turn."""
    experts = len(x["w_in"])

    def run() -> Tensor:
        gates = gating(x)
        ids = torch.where(gates.kept, gates.experts, experts)
        out = torch.zeros_like(x["x"])
        mask = F.one_hot(ids, experts + 1).permute(2, 1, 0)
        hit = mask[:-1].sum((1, 2)).nonzero()[:, 0].tolist()
        if not hit:
            return x["x"] * 0
        for e in hit:
            j, token = torch.where(mask[e])
            rows = expert(x, e, x["x"][token]) * gates.weights[token, j].unsqueeze(1)
            out = out.index_add(0, token, rows.to(out.dtype))
        return out

    return run


def cost_route(x: Inputs) -> Cost:
    moved = x["logits"].nbytes + 16.0 * len(x["logits"]) * x["k"]
    return Cost(flops=5.0 * x["logits"].numel(), bytes=moved, backward=2.0)


def cost(x: Inputs) -> Cost:
    counts = _route(x).counts
    each = x["w_in"][0].numel() + x["w_out"][0].numel()
    moved = (2 * x["x"].numel() + int((counts > 0).sum()) * each) * x["x"].element_size()
    return Cost(flops=2.0 * int(counts.sum()) * each, bytes=float(moved), backward=2.0)


def _test(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


_TOP2: dict[str, Any] = {"policy": "deepspeed_top2", "factor": 1.0}
_PHI: dict[str, Any] = {"activation": "gelu_tanh", "bias": True}

ROUTE_TESTS = (
    _test("uneven", F32, BF16, F16, F64),
    _test("top2", F32, BF16, F64, **_TOP2, noise="gumbel"),
    _test("top1", k=1, policy="deepspeed_top1", factor=1.0, noise="draw"),
    _test("probs", policy="deepspeed_probs", factor=0.75),
    _test("position", policy="deepspeed_position", k=3, factor=0.75),
    _test("capacity", policy="topk_capacity", factor=0.5, padding=3),
    _test("top1-first-come", k=1, policy="deepspeed_top1", factor=0.75, padding=2),
    _test("top2-whole", policy="deepspeed_top2"),
    _test("noisy", k=3, noise="gumbel"),
    _test("padded", padding=4, experts=6),
    _test("512-experts", tokens=70, experts=512, k=8, policy="topk_capacity", factor=1.0),
    _test("100-experts", tokens=300, experts=100, k=3, skew=0.9, policy="deepspeed_position", factor=1.25),
    _test("many-tokens", tokens=700, experts=8, skew=0.5, **_TOP2),
    _test("all-experts", experts=3, k=3),
    _test("one-expert", experts=1, k=1),
    _test("capacity-0", factor=0.0, policy="topk_capacity"),
    _test("one-token", tokens=1),
    _test("no-tokens", tokens=0),
)

TESTS = (
    _test("uneven", F32, BF16, F16, F64),
    _test("top2", F32, BF16, F16, F64, **_TOP2, **_PHI, noise="gumbel"),
    _test("skewed", skew=0.9, policy="topk_capacity", factor=1.25, tokens=48),
    _test("gelu", activation="gelu", bias=True, k=3),
    _test("silu", activation="silu"),
    _test("linear", activation=None, padding=4),
    _test("quick-gelu", activation="quick_gelu", experts=2),
    _test("many", F32, BF16, F16, tokens=150, experts=3, channels=40, hidden=33, bias=True),
    _test("many-gelu", tokens=300, experts=2, k=1, channels=24, **_PHI),
    _test("512-experts", tokens=20, experts=512, k=4, channels=6, hidden=4),
    _test("one-expert", experts=1, k=1),
    _test("all-dropped", factor=0.0, policy="topk_capacity", bias=True),
    _test("decode", tokens=3, channels=70, hidden=33, bias=True),
    _test("no-tokens", tokens=0, bias=True),
)


def _bench(name: str, headline: bool = False, **sizes: Any) -> Case:
    z = {"tokens": 640, "channels": 1024, "hidden": 2816} | sizes
    return Case(name, z, (F32, BF16), ("fwd",) if z["tokens"] < 64 else ("fwd", "fwd+bwd"), headline)


_LLAVA: dict[str, Any] = {"policy": "deepspeed_top2", "factor": 1.5}
_PHI2: dict[str, Any] = {"channels": 2560, "hidden": 10240, **_PHI, **_LLAVA}
_SMALL: dict[str, Any] = {"channels": 128, "hidden": 256}

BENCH = (
    _bench("moellava-640", headline=True, **_LLAVA),
    _bench("moellava-5120", False, tokens=5120, **_LLAVA | {"channels": 512, "hidden": 1408}),
    _bench("moellava-8", headline=True, tokens=8, channels=2048, hidden=5504),
    _bench("phi2-half-640", False, **_PHI2 | {"channels": 1280, "hidden": 5120}),
    _bench("phi2-8", False, **_PHI2 | {"policy": "dropless", "factor": None, "tokens": 8}),
    _bench("phi2-640", **_PHI2),
    _bench("phi2-5120", tokens=5120, **_PHI2),
    _bench("qwen-5120", tokens=5120, channels=2048, hidden=5504, **_LLAVA),
    _bench("mixtral-640", experts=8, channels=512, hidden=1792),
    _bench("skew-640"),
    _bench("skew-640-90", skew=0.9),
    *(_bench(f"experts-{e}", experts=e, **_SMALL) for e in (4, 16, 64, 128, 256, 512)),
    _bench("qwen3-8192", tokens=8192, experts=128, k=8, channels=2048, hidden=768),
)


def _bench_route(name: str, headline: bool = False, **sizes: Any) -> Case:
    return Case(name, sizes, (F32,), ("fwd", "fwd+bwd"), headline)


ROUTE_BENCH = (
    _bench_route("moellava-640", tokens=640, **_LLAVA),
    _bench_route("moellava-5120", headline=True, tokens=5120, **_LLAVA),
    _bench_route("moellava-8", tokens=8, **_LLAVA),
    _bench_route("mixtral-4096", tokens=4096, experts=8),
    _bench_route("128-experts-8192-k8", tokens=8192, experts=128, k=8),
    _bench_route("512-experts-8192-k8", tokens=8192, experts=512, k=8),
)

ROOMS = (
    Room(
        name="moe_route", make=make_route, call=call_route, differentiable=("logits",), tests=ROUTE_TESTS,
        bench=ROUTE_BENCH, cost=cost_route, peers={"eager": eager_route}, ops=("moe_route", "moe_route_backward"),
    ),
    Room(
        name="moe", make=make, call=call, differentiable=("x", "logits", "w_in", "w_out", "b_in", "b_out"), tests=TESTS,
        bench=BENCH, cost=cost, peers={"eager": eager}, ops=("moe_ffn", "moe_ffn_backward"),
    ),
)  # fmt: skip
