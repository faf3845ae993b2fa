"""What a row of a batch shows: a photograph or scan of a dataset, cut to a random size and aspect, or a page to be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkernels.data import pages
from mmkernels.data.dataset import Dataset
from mmkernels.data.dialogues import QUESTION
from mmkernels.data.pages import Page
from mmkernels.data.sequences import Sequences
from mmkernels.data.tokenizer import Tokenizer

SLOTS = 2  # of a patch: a digit in its left half, and one in its right half


@dataclass(frozen=True)
class Cutting:
    """A picture uint8 `[H, W, 3]` of any size, the number of its caption, and the page it is, if it is one."""

    pixels: NDArray[np.uint8]
    caption: int
    page: Page | None

    @property
    def question(self) -> str:
        return pages.QUESTION if self.page else QUESTION


class Scenes(Sequences):
    """Draws cuttings, every second one a page, and knows what each holds at every patch of a view.

    Kinds of what a patch holds, in either slot: the number of a caption, all over a photograph; behind those the ten digits, at
    the patch where a digit's centre is; last, `nothing`.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, size: int, *, seed: int = 0) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self._photographs = dataset
        self.nothing = len(dataset.captions) + 10
        self.dataset = replace(  # captions are counted with the pages
            dataset,
            captions=(*dataset.captions, "a page"),
            train=(*dataset.train, ()),
            held_out=(*dataset.held_out, ()),
        )

    def _rows(
        self, rng: np.random.Generator, batch: int, *, held_out: bool = False, full: bool = False
    ) -> list[Cutting]:
        return [
            self._page(rng, full=full) if n % 2 else self._photograph(rng, held_out=held_out)
            for n in range(batch)
        ]

    def _page(self, rng: np.random.Generator, **how: Any) -> Cutting:
        """Held-out pages are of a stream of their own: none is drawn twice but by chance."""
        page = pages.page(rng, **how)
        return Cutting(page.pixels, len(self._photographs.captions), page)

    def _photograph(self, rng: np.random.Generator, *, held_out: bool) -> Cutting:
        width, height = pages.sizes(rng)
        side = max(width, height)
        pixels, caption = self._photographs.draw(rng, side, held_out=held_out)
        left, top = (side - width) // 2, (side - height) // 2
        return Cutting(pixels[top : top + height, left : left + width], caption, None)

    def said(self, row: Cutting) -> str:
        """What a row's picture shows, in words."""
        return row.page.text if row.page else self._photographs.captions[row.caption]

    def holds(
        self, row: Cutting, grid: tuple[int, int], at: Callable[[float, float], tuple[float, float]]
    ) -> NDArray[np.int64]:
        """Kinds `[h, w, 2]` of a view's patches; `at(x, y)` is where a point of the picture falls, in patches."""
        h, w = grid
        kinds = np.full((h, w, SLOTS), self.nothing if row.page else row.caption)
        for digit, (x, y) in zip(row.page.digits, row.page.centres, strict=True) if row.page else ():
            across, down = at(x, y)
            slot, line = int(across * SLOTS // 1), int(down // 1)
            if 0 <= slot < w * SLOTS and 0 <= line < h:
                kinds[line, slot // SLOTS, slot % SLOTS] = len(self._photographs.captions) + digit
        return kinds


def texts(dataset: Dataset) -> list[str]:
    """What is said of pictures, for a tokenizer: captions and digits, also as answers."""
    digits = [f" {pages.written((n, n))}" for n in range(10)]
    return [*dataset.captions, *(f" {caption}" for caption in dataset.captions), *digits]
