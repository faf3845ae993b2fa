"""What a published system is trained by, beside the stages that its preset states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmkernels import models
from mmkernels.data import mixing
from mmkernels.models import Stage
from mmkernels.train.config import trainable

_SHOWN = (
    "name", "trainable", "losses", "mix", "learning_rate", "schedule", "warmup", "weight_decay", "rates", "steps", "image_size"
)  # fmt: skip
HOW = ("sizes", "square_root", "shares", "losses")


@dataclass(frozen=True)
class Mix:
    """The sets of a stage and their weights: "sizes" are sampled in proportion, "square_root" by `p ~ sqrt(size)`; "shares" add
    up to 1; "losses" weigh the loss of every set's own batch, gradients accumulated over all of them before a step. A source
    gives at most `cap` samples.
    """

    sets: Mapping[str, float]
    by: str = "sizes"
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.by not in HOW:
            raise ValueError(f"by: got {self.by!r}, expected one of {', '.join(HOW)}")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap: got {self.cap}, expected 1 or more")
        _ = mixing.explicit(self.sets) if self.by == "losses" else self.odds

    @property
    def odds(self) -> dict[str, float]:
        """How often a batch comes from each set; all alike where losses are weighed."""
        if self.by == "losses":
            return mixing.explicit(dict.fromkeys(self.sets, 1.0))
        return {"sizes": mixing.explicit, "square_root": mixing.square_root, "shares": mixing.shares}[
            self.by
        ](self.sets)


@dataclass(frozen=True)
class Recipe:
    """A system by its `preset` of published size, whose stages say what learns, from which losses and how fast; `tiny` is the
    model that goes through the same stages here. `data` is the published mix by stage. `parity` is the test in which its parts
    or its outputs equal what was published; `before` are stages that a model of another form goes through first.
    """

    system: str
    paper: str
    preset: str
    tiny: str
    connector: str
    data: Mapping[str, Mix]
    prompt: str
    labels: str
    apart: str
    parity: str = ""
    notes: str = ""
    before: tuple[Stage, ...] = ()

    def stands(self) -> tuple[str, ...]:
        """What can be done with it here: "trains" and "generates" (the tiny model), "parity"; nothing before its preset is."""
        known = models.list()
        if self.preset not in known:
            return ()
        found = () if self.tiny not in known or not _trains(self.tiny) else ("trains", "generates")
        return (*found, *(("parity",) if self.parity else ()))

    def describe(self) -> dict[str, Any]:
        """The whole recipe as plain values, stages included."""
        own = models.config(self.preset).stages if self.preset in models.list() else ()
        rows = [{key: asdict(stage)[key] for key in _SHOWN} for stage in (*self.before, *own)]
        plain = {key: value for key, value in asdict(self).items() if key != "before"}
        return {**plain, "stages": rows, "stands": list(self.stands())}


def _trains(model: str) -> bool:
    try:
        trainable(model)
    except ValueError:
        return False
    return True
