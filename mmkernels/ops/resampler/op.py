"""Latent attention: schema, gradient, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.resampler import composed, reference
from mmkernels.ops.resampler.absorbed import absorbs
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op, Row
from mmkernels.primitives.interval_attention import op as interval_attention

_INPUTS = (
    "Tensor latents, Tensor media, Tensor? cu_seqlens, Tensor w_q, Tensor? b_q, Tensor w_kv, Tensor? b_kv, "
    "Tensor? w_self, Tensor? b_self, Tensor w_o, Tensor? b_o, "
)


def _fake_forward(latents: Tensor, media: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (_, w_q, _, _, _, w_self, _, w_o, _, images, heads), new = rest, latents.new_empty
    shared, rows, _ = latents.shape
    width, keys = w_q.shape[0] // heads, media.shape[0] + (0 if w_self is None else images * rows)
    kept = (keys, 2, heads, width)
    if absorbs(latents, media, w_q, w_self, images, heads):
        kept = (heads, rows, keys)
    return (
        new((images, rows, w_o.shape[0])),
        new((shared, rows, heads, width)),
        new(kept),
        new((images, rows, heads, width)),
        new((images, heads, rows), dtype=torch.promote_types(latents.dtype, torch.float32)),
    )


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, media_grad = rest
    tensors = [inputs[0], inputs[1] if media_grad else None, *inputs[3:11]]
    return tuple(dout.new_empty(0 if x is None else x.shape) for x in tensors)


def _law(latents: Tensor, media: Tensor, cu_seqlens: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The reference; where keys and values are never made, probabilities are kept in their place."""
    w_q, _, _, _, w_self, *_, images, heads = rest
    out, q, kv, o, lse = reference.forward(latents, media, cu_seqlens, *rest)
    if absorbs(latents, media, w_q, w_self, images, heads):
        kv = reference.packed_weights(q, kv, cu_seqlens, images)
    return out, q, kv, o, lse


def _check_forward(latents: Tensor, media: Tensor, cu_seqlens: Tensor | None, *rest: Any) -> None:
    if cu_seqlens is None:
        return
    steps = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != media.shape[0] or bool((steps < 0).any()):
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.tolist()}, expected to rise from 0 to media's {media.shape[0]} tokens"
        )


FORWARD = Op(
    f"latent_attention({_INPUTS}int images, int heads) -> (Tensor out, Tensor q, Tensor kv, Tensor o, Tensor lse)",
    _law,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    f"latent_attention_backward(Tensor dout, {_INPUTS}Tensor q, Tensor kv, Tensor o, Tensor lse, int images, int heads, "
    "bool media_grad) -> (Tensor dlatents, Tensor dmedia, Tensor dw_q, Tensor db_q, Tensor dw_kv, Tensor db_kv, "
    "Tensor dw_self, Tensor db_self, Tensor dw_o, Tensor db_o)",
    reference.backward,
    fake=_fake_backward,
)


def _register(device: str, attend: Row, attend_backward: Row) -> None:
    """The composition is as fast as the kernels it is made of: it serves where they do, under their backend's name."""

    def supports(latents: Tensor, w_q: Tensor, heads: int) -> str:
        like = latents.new_empty((1, 1, heads, w_q.shape[0] // heads))
        seen = torch.zeros((1, 1), dtype=torch.int32, device=latents.device)
        return attend.supports(like, like, like, seen, seen, None, None, None, 1.0, 0.0)

    def present() -> str:
        return attend.present() or attend_backward.present()

    both = composed.Composed(attend.call, attend_backward.call)
    FORWARD.register(
        device, attend.backend, both.forward, present=present,
        supports=lambda *args: supports(args[0], args[3], args[12]),
    )  # fmt: skip
    BACKWARD.register(
        device, attend.backend, both.backward, present=present,
        supports=lambda *args: supports(args[1], args[4], args[17]),
    )  # fmt: skip


for _device, _rows in interval_attention.FORWARD.rows.items():
    _backwards = {row.backend: row for row in interval_attention.BACKWARD.rows[_device]}
    for _row in _rows:
        if _row.backend != "reference" and _row.backend in _backwards:
            _register(_device, _row, _backwards[_row.backend])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.images, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 13
    media_grad = ctx.needs_input_grad[1]
    dlatents, dmedia, *weights = BACKWARD(
        dout.contiguous(), *ctx.saved_tensors, ctx.images, ctx.heads, media_grad
    )
    given = ctx.saved_tensors[3:11]
    grads = (None if x is None else dw for x, dw in zip(given, weights, strict=True))
    return dlatents, dmedia if media_grad else None, None, *grads, None, None


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def latent_attention(
    latents: Tensor,
    media: Tensor,
    *,
    w_q: Tensor,
    w_kv: Tensor,
    w_o: Tensor,
    heads: int,
    b_q: Tensor | None = None,
    b_kv: Tensor | None = None,
    b_o: Tensor | None = None,
    w_self: Tensor | None = None,
    b_self: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A few latents read an image of any length: projections and attention as one op, over media alone or media and latents.

    `out = softmax(q k^T / sqrt(D)) v w_o^T + b_o` with `q = latents w_q^T + b_q` and `[k; v] = x w_kv^T + b_kv` over the media
    x of the image; with `w_self` also `[k; v] = latents w_self^T + b_self` over its own latents (Flamingo: w_self = w_kv).

    **Shapes** latents `[N, L, C]`, or `[L, C]`, the same for all images: their projections are then made once; media
    `[N, M, Cm]`, or `[K, Cm]` packed, image n at rows `cu_seqlens[n] .. cu_seqlens[n + 1] - 1`, cu_seqlens int32 `[N + 1]`; w_q
    `[heads * D, C]`; w_kv `[2 * heads * D, Cm]` and w_self `[2 * heads * D, C]`, rows of all keys first; w_o `[Co, heads * D]`;
    biases as long as their weights. Returns `[N, L, Co]`, and with `return_weights` (media of one length only) what each latent
    sees how much: `[N, heads, L, M]`, M + L columns with `w_self`, without gradient.
    **Dtypes** float32, bfloat16, float16, float64, one for all. Softmax and sums in float32. Under autocast its dtype.
    **Gradient** latents, media and every weight; deterministic; once differentiable. Media that need none cost none.
    **Edge** an image without media (and without w_self) gives b_o, or exactly 0; one image's values never reach another's.
    **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for cu_seqlens that do not rise from 0 to K;
    TypeError for dtypes and devices.
    **Source** Perceiver resampler of Flamingo (arXiv 2204.14198); Q-Former of BLIP-2 (arXiv 2301.12597).
    **Speed** `mmkernels bench --op resampler`.
    """
    weights = {
        "w_q": w_q,
        "b_q": b_q,
        "w_kv": w_kv,
        "b_kv": b_kv,
        "w_self": w_self,
        "b_self": b_self,
        "w_o": w_o,
        "b_o": b_o,
    }
    latents, media, *cast = _check.autocast(latents, media, *weights.values())  # type: ignore[assignment]
    weights = dict(zip(weights, cast, strict=True))
    images = _images(latents, media, cu_seqlens)
    _check_weights(latents, media, weights, heads)
    _check.dtypes(_check.FLOATS, latents=latents, media=media, **weights)
    _check.dtypes((torch.int32,), cu_seqlens=cu_seqlens)
    _check.devices(latents=latents, media=media, cu_seqlens=cu_seqlens, **weights)
    if return_weights and cu_seqlens is not None:
        raise ValueError("return_weights: got True with cu_seqlens, expected media of one length")
    latents, flat = (
        latents if latents.dim() == 3 else latents.unsqueeze(0),
        media.reshape(-1, media.shape[-1]),
    )
    out, q, kv, _, lse = FORWARD(latents, flat, cu_seqlens, *weights.values(), images, heads)
    if not return_weights:
        return out
    with torch.no_grad():
        if kv.dim() == 3:  # they are what was kept
            return out, kv.unflatten(-1, (images, -1)).permute(2, 0, 1, 3).contiguous()
        return out, reference.attention_weights(q, kv, lse, flat.shape[0])


def _images(latents: Tensor, media: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many images there are, all three arguments agreeing."""
    shared = latents.dim() == 2
    rows = {"latents": (latents, "L C" if shared else "N L C")}
    if cu_seqlens is None:
        size = _check.shapes(**rows, media=(media, "N M Cm"))
        return size["N"]
    _check.shapes(**rows, media=(media, "K Cm"), cu_seqlens=(cu_seqlens, "edges"))
    images = cu_seqlens.shape[0] - 1
    if images < 0 or (not shared and images != latents.shape[0]):
        expected = (
            "at least 1 edge" if shared else f"{latents.shape[0] + 1} edges around {latents.shape[0]} images"
        )
        raise ValueError(f"cu_seqlens: got {images + 1} edges, expected {expected}")
    return images


def _check_weights(latents: Tensor, media: Tensor, weights: dict[str, Tensor | None], heads: int) -> None:
    inner = weights["w_q"].shape[0]  # type: ignore[union-attr]
    if heads <= 0 or inner % heads:
        raise ValueError(f"heads: got {heads}, expected a positive divisor of w_q's {inner} rows")
    c, cm, both = latents.shape[-1], media.shape[-1], 2 * inner
    letters = {
        "w_q": f"{inner} {c}", "b_q": f"{inner}", "w_kv": f"{both} {cm}", "b_kv": f"{both}", "w_self": f"{both} {c}",
        "b_self": f"{both}", "w_o": f"Co {inner}", "b_o": "Co",
    }  # fmt: skip
    _check.shapes(**{name: (weights[name], shape) for name, shape in letters.items()})
    if weights["b_self"] is not None and weights["w_self"] is None:
        raise ValueError("b_self: got a bias without w_self, expected None")
