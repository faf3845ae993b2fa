"""What was replaced, in order, so that `revert` can put it back: attributes of modules, configurations and classes."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from mmkernels.integrations.hf import _kept

_ABSENT = object()


class _Change(NamedTuple):
    owner: weakref.ref[Any]
    name: str
    before: Any  # _ABSENT: the owner itself had no such attribute


_changes: list[_Change] = []


def replace(owner: Any, name: str, value: Any) -> None:
    """Sets `owner.name`, remembering what the owner itself held there."""
    _changes.append(_Change(weakref.ref(owner), name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


def holds(owner: Any, name: str) -> bool:
    """Whether a replacement of `owner.name` stands."""
    return any(change.name == name and change.owner() is owner for change in _changes)


def revert() -> None:
    """Puts back what every `patch` since the last revert replaced, the latest first; without a patch it does nothing."""
    _kept.forget()
    while _changes:
        owner_of, name, before = _changes.pop()
        owner = owner_of()
        if owner is None:
            continue
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
