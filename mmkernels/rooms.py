"""Finds the rooms: every package under primitives/ and ops/ whose `cases.py` holds a tuple ROOMS."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from mmkernels import ops, primitives
from mmkernels.primitives._case import Room


def rooms() -> dict[str, Room]:
    """All rooms by name, in the order primitives, then ops."""
    found: dict[str, Room] = {}
    for floor in (primitives, ops):
        for info in pkgutil.iter_modules(floor.__path__, f"{floor.__name__}."):
            if info.ispkg and importlib.util.find_spec(f"{info.name}.cases"):
                cases = importlib.import_module(f"{info.name}.cases")
                found.update((room.name, room) for room in cases.ROOMS)
    return found
