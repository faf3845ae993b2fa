"""What to run, by name, out of all rooms' tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import layers
from benchmarks.peers import peers
from mmkernels import models
from mmkernels.data.front_end import RULES
from mmkernels.primitives._case import Case, Room
from mmkernels.primitives._op import BACKENDS
from mmkernels.rooms import rooms as ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("fwd", "bwd", "fwd+bwd")
BUILT = ("compiled", "flex")  # seconds to build each: timed on headline rows, or when asked for
MODELS = "models"  # the name that whole-model rows are asked for by
FRONT_END = "front_end"  # and the image front end's, whose shapes are its rules
GENERATION = ("prefill-unequal", "generate-unequal", "decode-media")

Row = dict[str, Any]


def rooms() -> dict[str, Room]:
    """The ops' rooms, then whole layers."""
    return {**ops(), **{room.name: room for room in layers.ROOMS}}


@dataclass(frozen=True)
class Wanted:
    """What to run; an empty tuple means all there is."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    device: str = "cpu"
    quick: bool = False
    seconds: float = 1.5  # for the timing of a row

    def __post_init__(self) -> None:
        """**Raises** ValueError for a name that no room knows."""
        asked = [room for room in rooms().values() if not self.ops or room.name in self.ops]
        steps = {f"{model}-step" for model in models.list()}
        whole = steps | set(GENERATION) if not self.ops or MODELS in self.ops else set()
        rules = set(RULES) if not self.ops or FRONT_END in self.ops else set()
        known = {
            "ops": {*rooms(), MODELS, FRONT_END},
            "shapes": {case.name for room in asked for case in room.bench} | whole | rules,
            "dtypes": set(DTYPES),
            "passes": set(PASSES),
            "peers": {name for room in rooms().values() for name in peers(room)} | {"compiled", *BACKENDS},
        }
        for field, allowed in known.items():
            for value in getattr(self, field):
                if value not in allowed:
                    raise ValueError(f"{field}: got {value!r}, expected some of {', '.join(sorted(allowed))}")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device: got {self.device!r}, expected cpu, or cuda where torch sees one")

    @property
    def everything(self) -> bool:
        return not (self.ops or self.shapes or self.dtypes or self.passes or self.peers or self.quick)


def table(wanted: Wanted) -> list[tuple[Room, Case, torch.dtype]]:
    """The rows to run, before they are split by pass."""
    return [
        (room, case, dtype)
        for room in rooms().values()
        for case in room.bench
        for dtype in case.dtypes
        if (not wanted.ops or room.name in wanted.ops)
        and (not wanted.shapes or case.name in wanted.shapes)
        and (not wanted.dtypes or dtype_name(dtype) in wanted.dtypes)
        and (case.headline or not wanted.quick)
    ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
