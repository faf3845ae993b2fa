"""The published systems as runnable recipes: `mmkernels models` lists them, `mmkernels train --recipe NAME` runs one."""

from __future__ import annotations

import difflib

from mmkernels.train.recipes.adapted import ADAPTED
from mmkernels.train.recipes.crossed import CROSSED
from mmkernels.train.recipes.projected import PROJECTED
from mmkernels.train.recipes.queried import QUERIED
from mmkernels.train.recipes.recipe import Mix as Mix
from mmkernels.train.recipes.recipe import Recipe as Recipe
from mmkernels.train.recipes.sliced import SLICED

RECIPES: dict[str, Recipe] = CROSSED | QUERIED | PROJECTED | SLICED | ADAPTED


def recipe(name: str) -> Recipe:
    """A recipe by name. **Raises** ValueError for an unknown one, and for one whose tiny model does not train yet."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(RECIPES)}"
        raise ValueError(f"recipe: got {name!r}, no such recipe; {hint}")
    found = RECIPES[name]
    if "trains" not in found.stands():
        trained = ", ".join(n for n, r in RECIPES.items() if "trains" in r.stands())
        raise ValueError(f"recipe: {name!r} does not train here yet, expected one of {trained}")
    return found
