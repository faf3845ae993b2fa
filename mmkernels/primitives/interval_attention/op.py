"""Interval attention: schema, gradient, and the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.primitives import _check
from mmkernels.primitives._op import Op
from mmkernels.primitives.interval_attention import reference

_RULES = (
    "Tensor lo, Tensor hi, Tensor? uniform, Tensor? alibi_slopes, Tensor? seed, float scale, float dropout_p"
)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((b, h, t), dtype=wide)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _check_forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *rest: Any) -> None:
    _check.intervals(lo, hi, k.shape[1])


def kernel_head_dim(q: Tensor) -> str:
    """Why compiled kernels leave these queries to the reference ("" when they do not)."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} runs on the reference"
    width = q.shape[-1]
    return (
        "" if 0 < width <= 256 and width % 8 == 0 else f"head width {width} is not a multiple of 8 up to 256"
    )


FORWARD = Op(
    f"interval_attention(Tensor q, Tensor k, Tensor v, {_RULES}) -> (Tensor out, Tensor lse)",
    reference.forward,
    fake=_fake_forward,
    check=_check_forward,
)
BACKWARD = Op(
    "interval_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RULES}) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference.backward,
    fake=_fake_backward,
)
FORWARD.compiled("cpp", supports=lambda q, *_: kernel_head_dim(q))
BACKWARD.compiled("cpp", supports=lambda dout, dlse, q, *_: kernel_head_dim(q))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lo, hi, uniform, alibi_slopes, seed, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, uniform, alibi_slopes, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dout = torch.zeros_like(saved[3]) if dout is None else dout
    return (*BACKWARD(dout, dlse, *saved, ctx.scale, ctx.dropout_p), *(None,) * 7)


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    uniform: Tensor | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention in which row t sees the keys `lo[t] .. hi[t] - 1`.

    `out[t] = softmax(scale q[t] k^T + slope (j - (hi[t] - 1))) v` over the interval, j being the key's index.

    **Shapes** flat: q `[Tq, H, D]`, k and v `[Tk, G, D]`, lo, hi, uniform `[Tq]`; a packed batch is one such call. Or strided
    4-D: q `[B, H, Tq, D]`, k and v `[B, G, Tk, D]`, lo, hi, uniform `[B, Tq]`, indices local to the batch row; nothing is
    copied, so a preallocated cache can be passed as it is. G divides H. `alibi_slopes [H]`. Returns out like q, and with
    `return_lse` the log-sum-exp of shape `out.shape[:-1]`.
    **Dtypes** float32, bfloat16, float16, float64; lo, hi int32; uniform bool; seed int64 of one element. Accumulates in
    float32 (float64 for float64). Under autocast q, k, v take its dtype.
    **Gradient** q, k, v, also through lse; deterministic; not for `alibi_slopes`; once differentiable.
    **Edge** an empty interval gives 0, lse -inf, no gradient; a `uniform` row averages v over its interval (lse = log of its
    length) and gives q and k no gradient; keys that no row sees may hold anything, NaN included. Dropout keeps key j of row t,
    head h by a hash of (seed, t, h, j): the same on every backend.
    **Raises** ValueError for shapes, a p outside [0, 1), a missing seed, and on CPU (elsewhere with MMKERNELS_CHECK=1) for
    intervals outside the keys; TypeError for dtypes and devices. Kernels clamp: they never read out of bounds.
    **Source** FlashAttention-2 (arXiv 2307.08691) over key intervals; masks of Flamingo (arXiv 2204.14198).
    **Speed** `mmkernels bench --op interval_attention`.
    """
    q, k, v = _check.autocast(q, k, v)  # type: ignore[assignment]
    _check_arguments(q, k, v, lo, hi, uniform, alibi_slopes, dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    rules = (alibi_slopes, seed, scale, float(dropout_p))
    if q.dim() == 4:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = FORWARD(q, k, v, lo, hi, uniform, *rules)
        out = out.transpose(1, 2)
    else:
        rows = (x if x is None else x.unsqueeze(0) for x in (q, k, v, lo, hi, uniform))
        out, lse = FORWARD(*rows, *rules)
        out, lse = out.squeeze(0), lse.squeeze(0).transpose(0, 1)
    return (out, lse) if return_lse else out


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    uniform: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    if q.dim() == 4:
        letters = ("B H Tq D", "B G Tk D", "B Tq")
    else:
        letters = ("Tq H D", "Tk G D", "Tq")
    size = _check.shapes(
        q=(q, letters[0]),
        k=(k, letters[1]),
        v=(v, letters[1]),
        lo=(lo, letters[2]),
        hi=(hi, letters[2]),
        uniform=(uniform, letters[2]),
        alibi_slopes=(alibi_slopes, "H"),
    )
    if size["G"] == 0 or size["H"] % size["G"]:
        raise ValueError(f"k: got {size['G']} heads, expected a divisor of q's {size['H']} heads")
    _check.dtypes(_check.FLOATS, q=q, k=k, v=v)
    _check.dtypes((torch.int32,), lo=lo, hi=hi)
    _check.dtypes((torch.bool,), uniform=uniform)
    _check.devices(q=q, k=k, v=v, lo=lo, hi=hi, uniform=uniform, alibi_slopes=alibi_slopes, seed=seed)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 <= p < 1")
    if dropout_p > 0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(f"seed: got {seed!r}, expected an int64 tensor of one element when dropout_p > 0")


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact attention over the union of a row's disjoint intervals, from one `interval_attention` result for each.

    `out = sum_n exp(lse_n - lse) out_n`, `lse = log sum_n exp(lse_n)`.

    **Shapes** every out alike, every lse `out.shape[:-1]`. **Dtypes** as `interval_attention`. **Gradient** outs and lses.
    **Edge** a row empty in all of them gives 0 and -inf; intervals that overlap count their keys twice (the caller's promise).
    **Raises** ValueError for shapes or numbers that differ. **Source** FlashDecoding's combine.
    **Speed** plain PyTorch: one pass over the outputs.
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"lses: got {len(lses)} for {len(outs)} outs, expected one for each, at least one")
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs[{n}], lses[{n}]: got shapes {tuple(out.shape)} and {tuple(lse.shape)}, "
                f"expected {tuple(outs[0].shape)} and {tuple(outs[0].shape[:-1])}"
            )
    return reference.merge(torch.stack(list(outs)), torch.stack(list(lses)))
