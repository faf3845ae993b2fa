"""What a slicing rule decides about one picture, and about a batch of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Pair = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """How one picture is cut, and in which order its tokens reach the language model.

    Sizes are (width, height), `grid` is (columns, rows), `features` is (rows, columns) as a tensor has them. The picture is
    resized to `resized` and laid at `offset` on the canvas that `boxes` (x0, y0, x1, y1) cut row by row; rules that cut before
    they resize have `resized == size`. Every slice is `slice_size`, the view of the whole picture `overview_size`, each None
    where there is none. `features` is the map that the tokens of the slices form, or of one slice where they are not joined.

    `layout` has one entry a token: an index into the tokens of all views in the order in which they are encoded, or -1, -2 for
    the separators, which `separators` names in this order.
    """

    size: Pair
    grid: Pair
    resized: Pair
    offset: Pair
    features: Pair
    tokens: int
    slice_size: Pair | None
    overview_size: Pair | None
    separators: tuple[str, ...]
    _boxes: Callable[[Plan], Ints] = field(repr=False, compare=False)
    _layout: Callable[[Plan], Ints] = field(repr=False, compare=False)

    @functools.cached_property
    def boxes(self) -> list[Box]:
        return [(a, b, c, d) for a, b, c, d in self._boxes(self).tolist()]

    @functools.cached_property
    def layout(self) -> Ints:
        layout = self._layout(self)
        assert len(layout) == self.tokens
        layout.setflags(write=False)
        return layout

    @property
    def views(self) -> int:
        """How many pictures the encoder sees: the slices and the overview."""
        return len(self.boxes) + (self.overview_size is not None)

    def ids(self, image: int, newline: int | None = None, comma: int | None = None) -> Ints:
        """The token ids of the layout: `image` at every visual token. A rule with one separator takes it under either name.

        **Raises** ValueError when a separator of this layout has no id.
        """
        names = {"newline": newline, "comma": comma}
        layout = self.layout
        ids = np.full(len(layout), image, dtype=np.int64)
        for at, name in enumerate(self.separators):
            value = names[name]
            if value is None and len(self.separators) == 1:
                value = next((given for given in names.values() if given is not None), None)
            if value is None:
                raise ValueError(f"{name}: got None, expected the id of the separator of this layout")
            ids[layout == -1 - at] = value
        return ids

    def text(self, image: str = "<image>", newline: str = "\n", comma: str = ",") -> str:
        """The layout as text, `image` once for every visual token."""
        words = {-1 - at: {"newline": newline, "comma": comma}[n] for at, n in enumerate(self.separators)}
        return "".join(words.get(token, image) for token in self.layout.tolist())


@dataclass(frozen=True)
class Plans:
    """The plans of a batch: columns as arrays, `[B, 2]` or `[B]`, and a `Plan` at every index.

    `slice_size` and `overview_size` hold zeros where a picture has no slice or no overview; `boxes` and `layout` are lists.
    """

    size: Ints
    grid: Ints
    resized: Ints
    offset: Ints
    features: Ints
    tokens: Ints
    slice_size: Ints
    overview_size: Ints
    separators: tuple[str, ...]
    _boxes: Callable[[Plan], Ints] = field(repr=False, compare=False)
    _layout: Callable[[Plan], Ints] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: int) -> Plan:
        def pair(values: Ints) -> Pair:
            return int(values[at, 0]), int(values[at, 1])

        return Plan(
            pair(self.size),
            pair(self.grid),
            pair(self.resized),
            pair(self.offset),
            pair(self.features),
            int(self.tokens[at]),
            pair(self.slice_size) if self.slice_size[at, 0] else None,
            pair(self.overview_size) if self.overview_size[at, 0] else None,
            self.separators,
            self._boxes,
            self._layout,
        )

    def __iter__(self) -> Iterator[Plan]:
        return (self[at] for at in range(len(self)))

    @property
    def boxes(self) -> list[list[Box]]:
        return [plan.boxes for plan in self]

    @property
    def layout(self) -> list[Ints]:
        return [plan.layout for plan in self]


def sizes(width: ArrayLike, height: ArrayLike) -> tuple[Ints, Ints]:
    """Widths and heights as int64 `[B]`. **Raises** TypeError: no integers; ValueError: unequal shapes, a size below one."""
    found = []
    for name, value in (("width", width), ("height", height)):
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name}: got {array.dtype}, expected integers")
        if array.ndim > 1:
            raise ValueError(f"{name}: got shape {list(array.shape)}, expected one number or [B]")
        found.append(np.atleast_1d(array).astype(np.int64))
    w, h = found
    if w.shape != h.shape:
        raise ValueError(f"height: got {len(h)} of them, expected {len(w)}, as many as of width")
    if len(w) and min(w.min(), h.min()) < 1:
        at = int(np.argmax((w < 1) | (h < 1)))
        raise ValueError(f"width, height: got {w[at]} x {h[at]}, expected at least one pixel each way")
    return w, h


def positive(**values: int) -> None:
    """**Raises** ValueError for an argument that is not a whole number of at least one."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1")


def pair(name: str, value: int | Pair) -> Pair:
    """(width, height) of one number for a square, or of two. **Raises** ValueError for anything else."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(v, int) or v < 1 for v in both):
        raise ValueError(f"{name}: got {value!r}, expected one number or (width, height), each at least 1")
    return both[0], both[1]


def columns(first: ArrayLike, second: ArrayLike, like: Ints) -> Ints:
    """`[B, 2]` of two columns, either of which may be one number."""
    return np.stack([np.broadcast_to(np.asarray(v, dtype=np.int64), like.shape) for v in (first, second)], 1)


def scalar(width: ArrayLike, height: ArrayLike, plans: Plans) -> Plan | Plans:
    """The form that the caller's arguments had: one plan for two numbers."""
    return plans[0] if np.ndim(width) == 0 and np.ndim(height) == 0 else plans


def cells(plan: Plan, width: int, height: int) -> Ints:
    """The boxes of a grid of equal cells, row by row: int64 `[columns * rows, 4]`."""
    rows, cols = np.divmod(np.arange(plan.grid[0] * plan.grid[1]), plan.grid[0])
    return np.stack([cols * width, rows * height, (cols + 1) * width, (rows + 1) * height], 1)


def merged(plan: Plan, side: int) -> Ints:
    """Tokens of square tiles of `side`² tokens, in the order of the joined map: int64 `[rows * side, columns * side]`."""
    tiles = np.arange(plan.grid[0] * plan.grid[1] * side * side)
    return (
        tiles.reshape(plan.grid[1], plan.grid[0], side, side)
        .swapaxes(1, 2)
        .reshape(plan.grid[1] * side, plan.grid[0] * side)
    )


def check_slices(plans: Plan | Plans, most: int) -> None:
    """**Raises** ValueError when a picture is cut into more than `most` slices."""
    positive(most=most)
    for plan in [plans] if isinstance(plans, Plan) else plans:
        slices = plan.grid[0] * plan.grid[1]
        if slices > most:
            size = f"{plan.size[0]} x {plan.size[1]} pixels"
            raise ValueError(f"max_slices: {size} are cut into {slices} slices, expected at most {most}")


def check_context(tokens: int, context: int, text: int = 0) -> None:
    """**Raises** ValueError, saying by how much, when visual and text tokens do not fit into the context."""
    over = tokens + text - context
    if over > 0:
        what = f"{tokens} visual and {text} text tokens" if text else f"{tokens} visual tokens"
        raise ValueError(f"context: {what} are {over} more than the {context} that it holds")
