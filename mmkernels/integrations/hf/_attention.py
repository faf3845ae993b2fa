"""Attention under the name "mmkernels": interval attention where a row sees runs of keys, torch's own where it does not."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.hf import _masks
from mmkernels.integrations.hf._masks import Seen
from mmkernels.primitives.interval_attention import merge_attention
from mmkernels.primitives.interval_attention.op import FORWARD, kernel_head_dim

REASONS: Counter[str] = Counter()
SMALL = 1 << 22  # rows x keys x widths


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: query `[B, H, T, D]`, key and value `[B, G, M, D]` -> `[B, T, H, D]` and no weights.

    A mask that is neither causal order, nor a few runs of keys a row, nor absent goes to torch's attention unchanged; so do the
    calls that torch serves best. `explain` counts the former by reason.
    """
    refuse(kwargs)
    causal = module_is_causal(module, is_causal) and attention_mask is None and query.shape[2] > 1
    reason = _unfit(query, key, value, kwargs)
    found = None
    if not reason and torch.compiler.is_compiling():
        reason = (
            ""
            if attention_mask is None or _masks.is_intervals(attention_mask)
            else "a mask under torch.compile"
        )
    if not reason and (attention_mask is not None or causal) and not _torch_wins(query, key):
        found = _causal(query) if causal else _find(attention_mask, query.shape[2], key.shape[2])  # type: ignore[arg-type]
        reason = found.reason or _learns_from_nothing(found, query, key)
    if reason:
        REASONS[reason] += 1
    if reason or found is None or _skips_little(found, query):
        return _torch(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    return attend(query, key, value, found, dropout, scaling), None


def refuse(kwargs: dict[str, Any]) -> None:
    """What would change the result and no path of ours or torch's computes is an error."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            got = type(kwargs[name]).__name__
            raise ValueError(f'{name}: got {got}, expected None with attention "mmkernels"; use "eager"')


def module_is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _unfit(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> str:
    """Why interval attention cannot serve the call ("" when it can)."""
    if kwargs.get("position_bias") is not None:
        return "a position bias"
    if query.shape[0] != key.shape[0]:
        return "queries shared by the batch"
    if value.shape[-1] != key.shape[-1]:
        return "values of another width than keys"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of several dtypes"
    return "" if query.dtype == torch.float64 else kernel_head_dim(query)


def _torch_wins(query: Tensor, key: Tensor) -> bool:
    """A small call on a CPU in float32: what a call costs outweighs what it skips."""
    work = query.numel() * key.shape[2]
    return (
        work < SMALL
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and not torch.compiler.is_compiling()
    )


def _skips_little(found: Seen, query: Tensor) -> bool:
    """Several runs a row on a CPU in float32 (Mllama's tiles): a call for each costs more than what all of them skip."""
    return len(found.runs) > 1 and query.device.type == "cpu" and query.dtype == torch.float32


def _learns_from_nothing(found: Seen, query: Tensor, key: Tensor) -> str:
    """Their autograd gives scores a gradient through an average that no score can move; ours would not."""
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return (
        "gradients of rows whose additive mask hides every key"
        if learns and found.uniform is not None
        else ""
    )


def _find(mask: Tensor, rows: int, keys: int) -> Seen:
    return _masks._read(mask, rows, keys) if torch.compiler.is_compiling() else _masks.seen(mask, rows, keys)


def _causal(query: Tensor) -> Seen:
    where = (query.shape[0], query.shape[2], query.device)
    if torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter):
        return _rising(*where)
    return _remembered(*where, torch.is_inference_mode_enabled())


def _rising(batch: int, rows: int, device: torch.device) -> Seen:
    hi = torch.arange(1, rows + 1, dtype=torch.int32, device=device).expand(batch, rows).contiguous()
    return Seen(((torch.zeros_like(hi), hi),))


@functools.lru_cache(maxsize=16)
def _remembered(batch: int, rows: int, device: torch.device, inference: bool) -> Seen:
    return _rising(batch, rows, device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, found: Seen, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """Attention of `[B, H, T, D]` over the runs of keys -> `[B, T, H, D]`; dropout is drawn by torch's generator."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    seed = torch.randint(2**62, (1,), device=query.device) if dropout > 0 else None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if found.order is not None:
        k, v = (x.take_along_dim(found.order[:, :, None, None], 1) for x in (k, v))
    parts = [
        FORWARD(q, k, v, lo, hi, found.uniform if n == 0 else None, None, seed, scale, float(dropout))
        for n, (lo, hi) in enumerate(found.runs)
    ]
    if len(parts) == 1:
        return parts[0][0]
    outs, lses = zip(*parts, strict=True)
    return merge_attention(outs, [lse.transpose(1, 2) for lse in lses])[0]


def _torch(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and _masks.is_intervals(mask):
        mask = _dense(mask, query.shape[2], key.shape[2])
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return out, None


def _dense(mask: Tensor, rows: int, keys: int) -> Tensor:
    if torch.compiler.is_compiling():
        return _masks.dense(_find(mask, rows, keys), keys)
    found = _masks.seen(mask, rows, keys)  # once for all layers
    before, made = getattr(mask, "_mmkernels_dense", (None, None))
    if made is None or before is not found:
        made = _masks.dense(found, keys)
        mask._mmkernels_dense = (found, made)  # pyright: ignore[reportAttributeAccessIssue]
    return made
