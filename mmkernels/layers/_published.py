"""Tables that say where published checkpoints keep our parameters: renames, joins, splits and permutations, no arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Our parameters that match the pattern `ours` come from the published keys `theirs`, joined row by row.

    `{0}`, `{1}` in `theirs` are the groups of the pattern. `view` reshapes, permutes or picks rows of the joined tensor.
    """

    ours: str
    theirs: tuple[str, ...]
    view: Callable[[Tensor], Tensor] | None = None

    def sources(self, name: str) -> tuple[str, ...] | None:
        """The published keys behind our parameter `name`, or None when this rule is not about it."""
        found = re.fullmatch(self.ours, name)
        return None if found is None else tuple(key.format(*found.groups()) for key in self.theirs)

    def value(self, tensors: list[Tensor]) -> Tensor:
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined if self.view is None else self.view(joined)


@dataclass(frozen=True)
class Table:
    """A whole published layout.

    Our names that match a pattern in `absent` may be missing from a file; keys that match one in `ignored` are not read.
    `within` is where files of a whole system keep this module: if any key starts so, only those count, without it.
    """

    rules: tuple[Rule, ...]
    absent: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    within: str = ""

    def under(self, ours: str, theirs: str) -> Table:
        """The same table for a module that sits at the prefixes `ours` (of our names) and `theirs` (of published keys)."""
        head, braces = re.escape(ours), theirs.replace("{", "{{").replace("}", "}}")
        return Table(
            tuple(
                replace(r, ours=head + r.ours, theirs=tuple(braces + k for k in r.theirs)) for r in self.rules
            ),
            tuple(head + pattern for pattern in self.absent),
            tuple(re.escape(theirs) + pattern for pattern in self.ignored),
        )

    def __add__(self, other: Table) -> Table:
        return Table(self.rules + other.rules, self.absent + other.absent, self.ignored + other.ignored)


def renames(**pairs: str) -> tuple[Rule, ...]:
    """Rules `ours=theirs` for modules that keep their tensors as they are: `.weight`, and `.bias` where there is one."""
    return tuple(Rule(rf"{ours}\.(weight|bias)", (f"{theirs}.{{0}}",)) for ours, theirs in pairs.items())
