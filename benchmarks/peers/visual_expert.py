"""What else a user could write for rows of two modalities: both experts and a choice, and the floor of packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.ops.visual_expert.cases import expert, finish
from mmkernels.primitives._case import Inputs, Unsuited

Run = Callable[[], Tensor]


def where(x: Inputs) -> Run:
    """Both experts over all rows, of which each row keeps one."""
    vision, of_vision, of_text = x["is_vision"].unsqueeze(1), expert(x, "vision"), expert(x, "text")

    def run() -> Tensor:
        y = torch.where(vision, of_vision(x["x"]), of_text(x["x"]))
        if x["part"] != "mlp":
            return finish(x, y)
        return y if x["residual"] is None else y + x["residual"]

    return run


def packed(x: Inputs) -> Run:
    """The floor: each expert over as many rows as it has, as if they stood together, nothing moved, nothing after it."""
    count = int(x["is_vision"].sum())
    sides = ((expert(x, "text"), slice(count, None)), (expert(x, "vision"), slice(0, count)))
    if not len(x["x"]):
        raise Unsuited("no rows, no floor")
    used = [(run, own) for run, own in sides if len(x["x"][own])]

    def run() -> Tensor:
        found = [side(x["x"][own]) for side, own in used]
        return found[0] if len(found) == 1 else torch.cat(found)

    return run


PEERS = {"where": where, "packed": packed}
