"""Latent attention as data: its inputs, the shapes tested and timed, and what its users write today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.resampler.op import latent_attention
from mmkernels.primitives._case import Case, Cost, Inputs, Peer, Room, Unsuited, generator

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [N,H,L,D], k and v [N,H,keys,D] -> [N,H,L,D]

_SIZES: dict[str, Any] = {
    "images": 2, "tokens": 45, "latents": 24, "channels": 48, "media": 40, "heads": 2, "width": 24, "own": False, "tied": False,
    "bias": False, "shared": False,
}  # fmt: skip
_WEIGHTS = ("w_q", "b_q", "w_kv", "b_kv", "w_self", "b_self", "w_o", "b_o")


def make(seed: int, dtype: torch.dtype, device: str, **sizes: Any) -> Inputs:
    """`tokens` media tokens an image, or a tuple of one number for each; latents are keys too when `own` (by weights of
    their own) or `tied` (by the media's), and `shared` by all images."""
    z = _SIZES | sizes
    random, c, inner = generator(seed, device), z["channels"], z["heads"] * z["width"]
    ragged = isinstance(z["tokens"], tuple)
    images = len(z["tokens"]) if ragged else z["images"]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    def weight(rows: int, columns: int) -> Tensor:
        return draw(rows, columns, scale=columns**-0.5)

    def bias(rows: int) -> Tensor | None:
        return draw(rows, scale=0.2) if z["bias"] else None

    edges = torch.tensor((0, *z["tokens"])).cumsum(0).to(device, torch.int32) if ragged else None
    rows = (z["latents"], c) if z["shared"] else (images, z["latents"], c)
    return {
        "latents": draw(*rows),
        "media": draw(sum(z["tokens"]), z["media"]) if ragged else draw(images, z["tokens"], z["media"]),
        "w_q": weight(inner, c),
        "b_q": bias(inner),
        "w_kv": weight(2 * inner, z["media"]),
        "b_kv": bias(2 * inner),
        "w_self": weight(2 * inner, c) if z["own"] else None,
        "b_self": bias(2 * inner) if z["own"] else None,
        "w_o": weight(c, inner),
        "b_o": bias(c),
        "cu_seqlens": edges,
        "heads": z["heads"],
        "tied": z["tied"],
        "lengths": z["tokens"] if ragged else (z["tokens"],) * images,
    }


def call(x: Inputs) -> Tensor:
    weights: dict[str, Any] = {name: x[name] for name in _WEIGHTS} | _own(x)
    return latent_attention(x["latents"], x["media"], **weights, heads=x["heads"], cu_seqlens=x["cu_seqlens"])  # type: ignore[return-value]


def _own(x: Inputs) -> dict[str, Tensor | None]:
    """What makes keys and values of the latents."""
    kind = "kv" if x["tied"] else "self"
    return {"w_self": x[f"w_{kind}"], "b_self": x[f"b_{kind}"]}


def composed(core: Core) -> Peer:
    """The published layer around an attention core; ragged media image by image, since nothing is padded in the files."""

    def peer(x: Inputs) -> Callable[[], Tensor]:
        w_self, b_self = _own(x).values()

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (x["heads"], -1)).transpose(1, 2)

        def batch(latents: Tensor, media: Tensor) -> Tensor:
            q, kv = F.linear(latents, x["w_q"], x["b_q"]), F.linear(media, x["w_kv"], x["b_kv"])
            if w_self is not None:
                kv = torch.cat([kv, F.linear(latents, w_self, b_self)], 1)
            k, v = kv.chunk(2, -1)
            return F.linear(core(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2), x["w_o"], x["b_o"])

        def run() -> Tensor:
            latents, media = x["latents"], x["media"]
            if latents.dim() == 2:
                latents = latents.expand(len(x["lengths"]), -1, -1)
            if x["cu_seqlens"] is None:
                return batch(latents, media)
            parts = zip(latents.split(1), media.split(x["lengths"]), strict=True)
            return torch.cat([batch(own, part.unsqueeze(0)) for own, part in parts])

        return run

    return peer


def eager_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if k.shape[2] == 0:
        return scores @ v
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def concatenated(core: Core) -> Peer:
    """As Flamingo's files do it: media and latents become one sequence before they are projected."""
    plain = composed(core)

    def peer(x: Inputs) -> Callable[[], Tensor]:
        if (
            x["w_self"] is None
            or x["cu_seqlens"] is not None
            or x["media"].shape[-1] != x["latents"].shape[-1]
        ):
            return plain(x)

        def run() -> Tensor:
            latents = x["latents"].expand(len(x["lengths"]), -1, -1)
            q = F.linear(latents, x["w_q"], x["b_q"])
            k, v = F.linear(torch.cat([x["media"], latents], 1), x["w_kv"], x["b_kv"]).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (x["heads"], -1)).transpose(1, 2) for t in (q, k, v))
            return F.linear(core(q, k, v).transpose(1, 2).flatten(2), x["w_o"], x["b_o"])

        return run

    return peer


def absorbed(x: Inputs) -> Callable[[], Tensor]:
    """Scores from `(q Wk) x^T` and outputs from `(p x) Wv^T`: keys and values are never made. Fewer FLOPs when L < D."""
    if _own(x)["w_self"] is not None or x["cu_seqlens"] is not None:
        raise Unsuited("the absorbed form is written for media alone, of one length")

    def run() -> Tensor:
        latents, media, inner = x["latents"], x["media"], x["w_q"].shape[0]
        w_k, w_v = (w.unflatten(0, (x["heads"], -1)) for w in x["w_kv"].split(inner))
        q = F.linear(latents.expand(media.shape[0], -1, -1), x["w_q"], x["b_q"]).unflatten(
            -1, (x["heads"], -1)
        )
        t = torch.einsum("nlhd,hdc->nhlc", q, w_k).flatten(
            1, 2
        )  # a key's bias moves all scores of a row alike
        p = (t @ media.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        o = torch.einsum("nhlc,hdc->nlhd", (p @ media).unflatten(1, (x["heads"], -1)), w_v).flatten(2)
        return F.linear(o if x["b_kv"] is None else o + x["b_kv"][inner:], x["w_o"], x["b_o"])

    return run


def padded(x: Inputs) -> Callable[[], Tensor]:
    """Images of different lengths as one batch as long as the longest, its padding masked."""
    if x["cu_seqlens"] is None:
        raise Unsuited("these images are all of one length")
    if x["w_self"] is not None or x["tied"]:
        raise Unsuited("written for media alone")
    mask = torch.nn.utils.rnn.pad_sequence(
        [x["media"].new_ones(n) for n in x["lengths"]], batch_first=True
    ).bool()[:, None, None]
    masked = partial(F.scaled_dot_product_attention, attn_mask=mask)

    def run() -> Tensor:
        media = torch.nn.utils.rnn.pad_sequence(list(x["media"].split(x["lengths"])), batch_first=True)
        return composed(masked)({**x, "media": media, "cu_seqlens": None})()

    return run


def cost(x: Inputs) -> Cost:
    """What must be computed with keys and values made; the absorbed form may need less."""
    images, inner = len(x["lengths"]), x["w_q"].shape[0]
    latents = x["latents"].numel() * (images if x["latents"].dim() == 2 else 1)
    rows = latents // max(x["latents"].shape[-1], 1)
    own = rows // max(images, 1) if _own(x)["w_self"] is not None else 0
    pairs = (rows // max(images, 1)) * sum(n + own for n in x["lengths"])
    linear = 2.0 * (x["media"].numel() * 2 * inner + latents * (2 + 2 * (own > 0)) * inner)
    weights = sum(x[name].numel() for name in _WEIGHTS if x[name] is not None)
    moved = (x["media"].numel() + x["latents"].numel() + latents + weights) * x["media"].element_size()
    core = 4.0 * pairs * inner
    return Cost(linear + core, moved, backward=(2 * linear + 2.5 * core) / max(linear + core, 1))


def _test(name: str, *dtypes: torch.dtype, **sizes: Any) -> Case:
    return Case(name, sizes, dtypes or (F32, BF16))


_SMALL = {"latents": 3, "channels": 10, "media": 9, "width": 5, "bias": True}  # for numerical gradients

TESTS = (
    _test("uneven", F32, BF16, F16, F64, tokens=(37, 0, 60), own=True, bias=True),
    _test("media-alone", F32, BF16, F16, bias=True),
    _test("perceiver", F32, BF16, F16, tied=True, media=48),
    _test("perceiver-one-image", tied=True, media=48, images=1),
    _test("ragged-alone", tokens=(23, 61, 1), bias=True),
    _test("ragged-with-own", tokens=(43, 0, 31), own=True),
    _test("ragged-one-image", tokens=(53,), own=True),
    _test("shared", shared=True, bias=True),
    _test("shared-own", shared=True, own=True, bias=True),
    _test("shared-ragged", shared=True, own=True, tokens=(45, 22)),
    _test("nothing-to-read", tokens=(0, 0), bias=True),
    _test("no-media", tokens=0, bias=True),
    _test("no-media-but-own", tokens=0, own=True),
    _test("many-tiles", tokens=(150, 70), latents=70, own=True),
    _test("width-88", width=88),
    _test("width-20", F32, BF16, F64, width=20, own=True),  # compiled kernels refuse it
    _test("absorbed", F32, BF16, F16, latents=5, bias=True, tokens=(37, 0, 60)),
    _test("absorbed-even", latents=5, shared=True, bias=True),
    _test("absorbed-by-groups", latents=60, heads=9, width=128, tokens=300, images=1),
    _test("small", F64, tokens=6, own=True, **_SMALL),
    _test("small-ragged", F64, tokens=(2, 0, 5), own=True, **_SMALL),
    _test("small-shared", F64, tokens=(2, 4), shared=True, **_SMALL),
    _test("no-latents", latents=0),
    _test("no-images", images=0, own=True),
    _test("no-images-shared", images=0, own=True, shared=True),
)


def _bench(name: str, **sizes: Any) -> Case:
    return Case(name, sizes, (F32, BF16), ("fwd", "fwd+bwd"), headline=name == "flamingo-video8")


_PERCEIVER: dict[str, Any] = {
    "latents": 64,
    "channels": 1024,
    "media": 1024,
    "heads": 8,
    "width": 64,
    "tied": True,
}
_QFORMER: dict[str, Any] = {
    "latents": 32,
    "channels": 768,
    "media": 1408,
    "heads": 12,
    "width": 64,
    "bias": True,
}
_UHD: dict[str, Any] = {
    "latents": 64,
    "channels": 4096,
    "media": 4096,
    "heads": 32,
    "width": 128,
    "bias": True,
    "shared": True,
}
_MINICPM = _UHD | {"channels": 2304, "media": 2304, "heads": 18}  # before a smaller language model
_QWEN = _UHD | {"latents": 256}

BENCH = (
    _bench("flamingo-video8", images=1, tokens=2048, **_PERCEIVER),
    _bench("flamingo-1img", images=1, tokens=256, **_PERCEIVER),
    _bench("flamingo-32img", images=32, tokens=256, **_PERCEIVER),
    _bench("flamingo-video8x4", images=4, tokens=2048, **_PERCEIVER),
    _bench("qformer-b1", images=1, tokens=257, **_QFORMER),
    _bench("qformer-b8", images=8, tokens=257, **_QFORMER),
    _bench("qformer-b128", images=128, tokens=257, **_QFORMER),
    _bench("qwenvl-b1", images=1, tokens=1024, **_QWEN),
    _bench("qwenvl-b16", images=16, tokens=1024, **_QWEN),
    _bench("uhd-1slice", images=1, tokens=576, **_UHD),
    _bench("uhd-7slice", tokens=(576, 432, 432, 300, 300, 576, 200), **_UHD),
    _bench("minicpm-3slice", tokens=(576, 432, 300), **_MINICPM),
    _bench("stress-64x16k", images=1, tokens=16_384, **_PERCEIVER),
)

ROOMS = (
    Room(
        name="resampler",
        make=make,
        call=call,
        differentiable=("latents", "media", *_WEIGHTS),
        tests=TESTS,
        bench=BENCH,
        cost=cost,
        peers={
            "eager": concatenated(eager_core),
            "sdpa": concatenated(F.scaled_dot_product_attention),
            "absorbed": absorbed,
            "padded": padded,
        },
        ops=("latent_attention", "latent_attention_backward"),
    ),
)
