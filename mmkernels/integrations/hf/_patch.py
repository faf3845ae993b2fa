"""`patch`: finds what can be served in a model and replaces it; `revert` is in `_undo`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from mmkernels.integrations.hf import _layers, _padding, _undo
from mmkernels.integrations.hf._attention import REASONS, attention
from mmkernels.integrations.hf._experts import experts
from mmkernels.integrations.hf._masks import interval_mask

NAME = "mmkernels"
KINDS = ("attention", "experts", "cross_attention", "resampler", "packed_vision", "padding")
NO_MEDIA = ("published", "zero")
Make = Callable[[_layers.Forward], _layers.Forward]

_BY_CLASS: dict[str, tuple[str, Make]] = {
    "IdeficsGatedCrossAttentionLayer": ("cross_attention", _layers.idefics_gated_layer),
    "IdeficsPerceiverResampler": ("resampler", _layers.idefics_resampler),
    "IdeficsPerceiverAttention": ("resampler", _layers.idefics_perceiver_attention),
    **dict.fromkeys(
        ("LlamaModel", "MistralModel", "PersimmonModel", "Qwen2Model"), ("padding", _padding.decoder)
    ),
    "AriaCrossAttention": ("resampler", _layers.aria_cross_attention),
}
_WITHOUT_LEAK = {"MllamaCrossAttentionDecoderLayer": ("cross_attention", _layers.mllama_cross_layer)}


def register() -> None:
    """Makes "mmkernels" a name for `attn_implementation=` and `experts_implementation=`; importing this package does it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, attention)
    if (
        NAME not in ALL_MASK_ATTENTION_FUNCTIONS
    ):  # without it every mask would be None and padding be attended to
        AttentionMaskInterface.register(NAME, interval_mask)
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(NAME, experts)


def patch(
    model_or_class: nn.Module | type[nn.Module],
    *,
    only: str | Iterable[str] | None = None,
    no_media: str = "published",
) -> list[str]:
    """Serves a Hugging Face model by our ops from now on, without touching its weights, and says what was replaced.

    A model: its attention and experts go by the name "mmkernels", and layers that these interfaces do not reach get our
    forward. A model class: the same for every model made of it later. A layer class of theirs: its forward, everywhere.

    `only`: some of "attention", "experts", "cross_attention", "resampler", "packed_vision", "padding".
    `no_media="zero"` closes Mllama's leak (rows before every image get nothing from any); "published" keeps it.
    **Edge** what is replaced already is left alone; a list may then be empty.
    **Raises** ValueError when nothing in the model matches, and for unknown names; TypeError for what is no module or class.
    """
    kinds = _kinds(only)
    if no_media not in NO_MEDIA:
        raise ValueError(f"no_media: got {no_media!r}, expected one of {', '.join(map(repr, NO_MEDIA))}")
    register()
    REASONS.clear()
    if isinstance(model_or_class, nn.Module):
        matched, replaced = _model(model_or_class, kinds, no_media)
    elif isinstance(model_or_class, type) and issubclass(model_or_class, nn.Module):
        matched, replaced = _class(model_or_class, kinds, no_media)
    else:
        raise TypeError(
            f"model_or_class: got {type(model_or_class).__name__}, expected a module or a class of modules"
        )
    if not matched:
        name = model_or_class.__name__ if isinstance(model_or_class, type) else type(model_or_class).__name__
        raise ValueError(f"model_or_class: nothing in {name} matches {', '.join(kinds)}")
    return replaced


def explain() -> dict[str, int]:
    """Why calls since the last `patch` took torch's attention or the layer's own forward, and how many: {reason: calls}."""
    return dict(REASONS)


def _kinds(only: str | Iterable[str] | None) -> tuple[str, ...]:
    kinds = KINDS if only is None else (only,) if isinstance(only, str) else tuple(only)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"only: got {unknown or 'nothing'}, expected some of {', '.join(map(repr, KINDS))}")
    return kinds


def _makes(cls: type, no_media: str) -> tuple[str, Make] | None:
    """The kind and the forward for a layer class of theirs."""
    if not cls.__module__.startswith("transformers."):
        return None
    table = _BY_CLASS | (_WITHOUT_LEAK if no_media == "zero" else {})
    if cls.__name__ in table:
        return table[cls.__name__]
    if cls.__name__ == "AriaExperts" and hasattr(cls, "route_tokens_to_experts"):
        return "experts", _layers.aria_experts
    names = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    packed = {"hidden_states", "cu_seqlens", "position_embeddings"} <= set(names) and "qkv" in _code(
        cls.__init__
    )
    return ("packed_vision", _layers.packed_vision) if packed else None


def _code(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names a function uses, through its decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else (*code.co_names, *code.co_varnames)


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "config") and "ALL_ATTENTION_FUNCTIONS" in _code(type(module).forward)


def _chooses_experts(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _model(model: nn.Module, kinds: tuple[str, ...], no_media: str) -> tuple[bool, list[str]]:
    matched, replaced = False, []
    for name, module in _modules(model):
        found = _makes(type(module), no_media)
        if found is not None and found[0] in kinds:
            matched = True
            if not _undo.holds(module, "forward") and not _undo.holds(type(module), "forward"):
                before = vars(module).get("forward")
                original = type(module).forward if before is None else _unbound(before)
                _undo.replace(module, "forward", MethodType(found[1](original), module))
                replaced.append(f"{name} ({type(module).__name__}): {found[0]}")
        for kind, serves, attribute in (
            ("attention", _attends, "_attn_implementation_internal"),
            ("experts", _chooses_experts, "_experts_implementation_internal"),
        ):
            if kind in kinds and serves(module):
                matched = True
                replaced += _name(name, module, kind, attribute)
    return matched, replaced


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without those of models that torch's attention cannot serve either (sinks, capped scores)."""
    from transformers import PreTrainedModel

    left_out = ()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not module._supports_sdpa:
            left_out = (*left_out, f"{name}." if name else "")
        if not any(name.startswith(prefix) for prefix in left_out):
            yield name or "model", module


def _name(name: str, module: nn.Module, kind: str, attribute: str) -> list[str]:
    """Gives the module's configuration our name, once for all modules that share it."""
    config: Any = module.config
    if getattr(config, attribute, None) == NAME:
        return []
    _undo.replace(config, attribute, NAME)
    return [f"{name} ({type(module).__name__}) and all of its configuration: {kind}"]


def _unbound(forward: Callable[..., Any]) -> _layers.Forward:
    """A forward that somebody bound to one module, as a function of the module."""
    return lambda module, *args, **kwargs: forward(*args, **kwargs)


def _class(cls: type[nn.Module], kinds: tuple[str, ...], no_media: str) -> tuple[bool, list[str]]:
    from transformers import PreTrainedModel

    if issubclass(cls, PreTrainedModel):
        if _undo.holds(cls, "__init__"):
            return True, []
        _undo.replace(cls, "__init__", _then_patched(cls.__init__, kinds, no_media))
        return True, [f"{cls.__name__}.__init__: every model made of it is patched"]
    found = _makes(cls, no_media)
    if found is None or found[0] not in kinds:
        return False, []
    if _undo.holds(cls, "forward"):
        return True, []
    _undo.replace(cls, "forward", found[1](cls.forward))  # type: ignore[attr-defined]
    return True, [f"{cls.__name__}.forward: {found[0]}"]


def _then_patched(init: Callable[..., None], kinds: tuple[str, ...], no_media: str) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _model(self, kinds, no_media)

    return wrapped
