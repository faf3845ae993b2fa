"""Hugging Face's masks as runs of keys: made as such where the pattern is known, found in a finished mask otherwise.

A mask travels through their models as a tensor. Where we make it, it is int32 `[B, 1, T, 2]`: the interval of every row, no
`[T, M]` anywhere; nothing but `attention` can read one (torch refuses an integer mask). A finished mask, bool or additive, is
read once and what was found stays with the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

RUNS = 4  # a row may see so many separate runs; each is one call, merged exactly


class Seen(NamedTuple):
    """The runs of keys that rows see, each `(lo, hi)` int32 `[B, T]`, or why they are no such runs."""

    runs: tuple[tuple[Tensor, Tensor], ...] = ()
    uniform: Tensor | None = (
        None  # bool [B, T]: rows whose additive mask hides every key, which softmax then averages
    )
    reason: str = ""
    order: Tensor | None = None  # int64 [B, M]: the runs are of the keys in this order


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # int, or a tensor where a cache is static
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **rules: Any,
) -> Tensor | None:
    """What `AttentionMaskInterface` calls: the intervals of causal and whole-sequence attention with padding on either side.

    None where nothing but the order of the rows hides a key. Every other pattern (windows, chunks, packed texts, padding with
    holes) and every mask that the model means to work on comes as their own boolean one, exact and read by `seen`.
    """
    from transformers import masking_utils

    causal = mask_function in (None, masking_utils.causal_mask_function)
    whole = mask_function is masking_utils.bidirectional_mask_function
    skips = (rules.get("allow_is_causal_skip", True) or q_length == 1) if causal else False
    skips = skips or (whole and rules.get("allow_is_bidirectional_skip", False))
    known = (causal or whole) and skips and rules.get("local_size") is None and not rules.get("use_vmap")
    if known and not (attention_mask is not None and torch.compiler.is_compiling()):
        places = (batch_size, q_length, kv_length, q_offset, kv_offset)
        found = _padded(places, causal, attention_mask, rules.get("device", "cpu"))
        if not isinstance(found, str):
            return found
    if mask_function is not None:
        rules["mask_function"] = mask_function
    return masking_utils.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, **rules,
    )  # fmt: skip


def _padded(
    places: tuple[Any, ...], causal: bool, attention_mask: Tensor | None, device: Any
) -> Tensor | str | None:
    """Intervals of causal or whole rows over keys of which `attention_mask` hides a part; a string when that has holes."""
    batch, rows, keys, q_offset, kv_offset = places
    valid = None
    if attention_mask is not None:
        end = kv_offset + keys - attention_mask.shape[-1]
        padded = (
            torch.nn.functional.pad(attention_mask.bool(), (0, end)) if end > 0 else attention_mask.bool()
        )
        valid = padded[:, kv_offset : kv_offset + keys]
        valid = None if bool(valid.all()) else valid
    if valid is None and (
        not causal
        or (isinstance(q_offset, int) and (rows == keys or rows == 1) and q_offset - kv_offset + rows == keys)
    ):
        return None
    hi = torch.full((rows,), keys, device=device)
    if causal:
        hi = (torch.arange(1, rows + 1, device=device) + q_offset - kv_offset).clamp(max=keys)
    hi = hi.expand(batch, rows)
    lo = torch.zeros_like(hi)
    if valid is not None:
        first, count = valid.int().argmax(-1, keepdim=True), valid.sum(-1, keepdim=True)
        if bool(((torch.arange(keys, device=device) >= first + count) & valid).any()):
            return "padding with holes"
        lo = first.expand(batch, rows)
        hi = torch.maximum(torch.minimum(hi, first + count), lo)
    return torch.stack((lo, hi), -1).int().unsqueeze(1)


def is_intervals(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[-1] == 2


def seen(mask: Tensor, rows: int, keys: int) -> Seen:
    """The runs in a mask for `rows` rows over `keys` keys; kept with the tensor, found again when it was written to."""
    inference = torch.is_inference_mode_enabled()
    stamp = (rows, keys, inference, None if mask.is_inference() else mask._version)
    before, found = getattr(mask, "_mmkernels_seen", (None, None))
    if found is None or before != stamp:
        found = _read(mask, rows, keys)
        mask._mmkernels_seen = (stamp, found)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _read(mask: Tensor, rows: int, keys: int) -> Seen:
    if is_intervals(mask):
        lo, hi = (side.contiguous() for side in mask[:, 0].unbind(-1))
        return Seen(((lo, hi),))
    if mask.dim() != 4 or mask.shape[-1] != keys or mask.shape[-2] not in (1, rows):
        return Seen(reason=f"a mask of shape {tuple(mask.shape)} for {rows} rows over {keys} keys")
    if mask.shape[1] != 1:
        return Seen(reason="a mask for every head of its own")
    if mask.requires_grad:
        return Seen(reason="a mask that learns")
    mask = mask.detach().squeeze(1).expand(-1, rows, -1)
    if mask.dtype == torch.bool:
        return _runs(mask, None)
    if not mask.is_floating_point():
        return Seen(reason=f"a mask of {mask.dtype}")
    visible, floor = mask == 0, torch.finfo(mask.dtype).min
    if not bool((visible | (mask <= floor / 2)).all()):
        return Seen(reason="a mask that adds a bias")
    empty = ~visible.any(-1)
    if not bool(empty.any()):
        return _runs(visible, None)
    hidden = mask[empty]
    if not bool((hidden == floor).all()):
        return Seen(reason="rows without a key under an infinite mask")
    return _runs(visible, empty)


def _runs(visible: Tensor, uniform: Tensor | None) -> Seen:
    """At most RUNS runs of True a row, bool `[B, T, M]`."""
    before = torch.nn.functional.pad(visible[..., :-1], (1, 0))
    starts = visible & ~before
    number = starts.sum(-1)
    most = int(number.max()) if number.numel() else 0
    if most > RUNS and bool((visible == visible[:, :1]).all()):
        return _compacted(visible, uniform)
    if most > RUNS:
        return Seen(reason=f"rows that see {most} separate runs of keys, more than {RUNS}")
    which, runs = starts.cumsum(-1) if most > 1 else None, []
    for n in range(max(most, 1)):
        own = visible if which is None else visible & (which == n + 1)
        lo, count = own.int().argmax(-1), own.sum(-1)
        runs.append([lo, lo + count])
    if uniform is not None:
        keys = visible.shape[-1]
        runs[0] = [torch.where(uniform, 0, runs[0][0]), torch.where(uniform, keys, runs[0][1])]
    return Seen(tuple((lo.int().contiguous(), hi.int().contiguous()) for lo, hi in runs), uniform)


def _compacted(visible: Tensor, uniform: Tensor | None) -> Seen:
    """Keys hidden from every row alike (an image padded at its right): the others first, in their order, are one run."""
    of_sample = visible[:, 0]
    order = (~of_sample).int().argsort(dim=-1, stable=True)
    hi = of_sample.sum(-1, keepdim=True, dtype=torch.int32).expand(visible.shape[:2]).contiguous()
    if uniform is not None:
        hi = torch.where(uniform, visible.shape[-1], hi)
    return Seen(((torch.zeros_like(hi), hi),), uniform, order=order)


def dense(found: Seen, keys: int) -> Tensor:
    """The boolean mask `[B, 1, T, M]` of the runs, for torch's own attention."""
    j = torch.arange(keys, device=found.runs[0][0].device)
    masks = [(j >= lo.unsqueeze(-1)) & (j < hi.unsqueeze(-1)) for lo, hi in found.runs]
    mask = masks[0]
    for other in masks[1:]:
        mask = mask | other
    return mask.unsqueeze(1)
