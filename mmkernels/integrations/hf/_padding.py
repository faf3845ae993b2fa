"""Text decoders without their padding: a padded batch runs as one packed row in which every token sees its own text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WORTH = 0.9  # packing pays where at most this share of the positions is text
CACHES = ("cache", "past_key_values")  # one name or the other, by version


class _PaddedCache:
    """Takes the packed keys and values of a layer and writes them where they stand in the padded batch."""

    def __init__(self, cache: Any, where: Tensor, batch: int, length: int) -> None:
        self.cache, self._where, self._shape = cache, where, (batch, length)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cache.update(self._padded(key), self._padded(value), *args, **kwargs)
        return key, value

    def _padded(self, x: Tensor) -> Tensor:
        return padded(x[0].transpose(0, 1), self._where, self._shape).transpose(1, 2)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def padded(x: Tensor, where: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed rows `[N, ...]` at their places in zeros `[B, T, ...]`."""
    out = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return out.index_copy(0, where, x).unflatten(0, shape)


def decoder(original: Callable[..., Any]) -> Callable[..., Any]:
    """`LlamaModel` and its kin. What stands at padding is zero; their own there differs with every attention they offer.

    The first pass over a padded batch is packed, with or without a cache to fill; all else runs as it did: later tokens, masks
    that are no padding, sliding windows, torch.compile, and calls that ask for hidden states of every layer.
    """

    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        embeds = kwargs.pop("inputs_embeds", None)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": embeds, **kwargs}
        if (input_ids is None) == (embeds is None) or not _packs(self, given):
            return original(self, **given)
        assert attention_mask is not None
        batch, length = attention_mask.shape
        valid = attention_mask.bool().flatten()
        where = valid.nonzero().squeeze(1)
        if len(where) > WORTH * batch * length:
            return original(self, **given)
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is None:
            position_ids = torch.arange(length, device=where.device).unsqueeze(0)
        x = self.embed_tokens(input_ids.flatten()[where]) if embeds is None else embeds.flatten(0, 1)[where]  # type: ignore[union-attr]
        name, cache = next(((n, kwargs[n]) for n in CACHES if kwargs.get(n) is not None), (None, None))
        cache = cache if cache is not None else _fresh(self, kwargs)
        if cache is not None:
            name = name or _cache_name(original)
            kwargs[name] = _PaddedCache(cache, where, batch, length)
        out = original(
            self, inputs_embeds=x.unsqueeze(0), attention_mask=_own_text(attention_mask, where),
            position_ids=position_ids.expand(batch, length).flatten()[where].unsqueeze(0), **kwargs,
        )  # fmt: skip
        return _unpacked(out, cache, where, (batch, length))

    return forward


def _packs(model: Any, given: dict[str, Any]) -> bool:
    mask, config = given["attention_mask"], model.config
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    if config._attn_implementation != "mmkernels" or getattr(config, "sliding_window", None) is not None:
        return False
    asked = ("output_hidden_states", "output_attentions", "return_dict")
    wishes = {name: given.get(name, getattr(config, name, None)) for name in asked}
    if wishes["output_hidden_states"] or wishes["output_attentions"] or wishes["return_dict"] is False:
        return False
    text = given["inputs_embeds"] if given["input_ids"] is None else given["input_ids"]
    positions = given.get("position_ids")
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    return (
        text.shape[:2] == mask.shape
        and (positions is None or positions.dim() == 2)
        and (
            cache is None
            or (not getattr(cache, "is_compileable", False) and int(cache.get_seq_length()) == 0)
        )
    )


def _fresh(model: Any, kwargs: dict[str, Any]) -> Any:
    """The cache that their forward would make."""
    from transformers import DynamicCache

    wanted = kwargs.get("use_cache")
    wanted = getattr(model.config, "use_cache", False) if wanted is None else wanted
    checkpointing = model.training and getattr(model, "gradient_checkpointing", False)
    return DynamicCache(config=model.config) if wanted and not checkpointing else None


def _cache_name(original: Callable[..., Any]) -> str:
    names = inspect.signature(original).parameters
    return next((name for name in CACHES if name in names), CACHES[0])


def _own_text(mask: Tensor, where: Tensor) -> Tensor:
    """int32 `[1, 1, N, 2]`: every token sees its text's tokens up to itself."""
    counts = mask.bool().sum(1)
    starts = counts.cumsum(0) - counts
    lo = starts[where // mask.shape[1]]
    hi = torch.arange(1, len(where) + 1, device=where.device)
    return torch.stack((lo, hi), -1).int()[None, None]


def _unpacked(out: Any, cache: Any, where: Tensor, shape: tuple[int, int]) -> Any:
    out.last_hidden_state = padded(out.last_hidden_state[0], where, shape)
    for name in CACHES:
        if isinstance(getattr(out, name, None), _PaddedCache):
            out[name] = cache
    return out
