"""Pages of rendered text, of many sizes, whose words are known: what is written on them can be checked letter by letter.

A page is a light ground of its own colour with a number of `DIGITS` digits in dark ink, in one of the DejaVu fonts that come
with matplotlib. Letters stand in cells of `CELL` pixels, as a terminal writes them, whatever the size of the page: on a large
page they are small. The number is somewhere in the central square. No page is ever drawn twice but by chance.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

DIGITS = 2
QUESTION = "what is written?"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
CELL = 8
SIZES = (  # (width, height): a side of 32 or of 64 and another that is no longer than 96, or 64
    *((n, 32) for n in range(32, 97, CELL)),
    *((32, n) for n in range(40, 97, CELL)),
    *((n, 64) for n in range(40, 65, CELL)),
    *((64, n) for n in range(40, 64, CELL)),
)
_LETTER = 9  # pixels of the font


@dataclass(frozen=True)
class Page:
    """pixels uint8 `[H, W, 3]`, the digits on it, and their centres (x, y) in pixels."""

    pixels: NDArray[np.uint8]
    digits: tuple[int, ...]
    centres: tuple[tuple[float, float], ...]

    @property
    def text(self) -> str:
        """What the answer says: digits apart, so that each is a token."""
        return written(self.digits)


def written(digits: tuple[int, ...]) -> str:
    return " ".join(map(str, digits))


def page(
    rng: np.random.Generator,
    *,
    size: tuple[int, int] | None = None,
    full: bool = False,
    held_out: bool | None = None,
) -> Page:
    """A page of a given or a random size (width, height), or one that is `full` of digits, to learn them from.

    `held_out` asks for a number of the fifth that is held out, or of the others; None: of all.
    """
    width, height = size or sizes(rng)
    centres = _filled(rng, width, height) if full else _placed(rng, width, height)
    digits = _digits(rng, len(centres))
    while held_out is not None and (sum((n + 1) * d for n, d in enumerate(digits)) % 5 == 0) != held_out:
        digits = _digits(rng, len(centres))
    ground, ink = rng.integers(200, 256, size=3), rng.integers(0, 90, size=3)
    image = Image.new("RGB", (width, height), tuple(int(c) for c in ground))
    draw, font = ImageDraw.Draw(image), _fonts()[int(rng.integers(len(FONTS)))]
    for digit, centre in zip(digits, centres, strict=True):
        draw.text(centre, str(digit), font=font, fill=tuple(int(c) for c in ink), anchor="mm")
    return Page(np.asarray(image), digits, tuple(centres))


def _digits(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(int(d) for d in rng.integers(10, size=count))


def _placed(rng: np.random.Generator, width: int, height: int) -> list[tuple[float, float]]:
    """One number, in the central square."""
    side = min(width, height) // CELL
    left, top = ((n // CELL - side + 1) // 2 for n in (width, height))
    column = left + int(rng.integers(side - DIGITS + 1 - (left * CELL * 2 > width - side * CELL)))
    row = top + int(rng.integers(side - (top * CELL * 2 > height - side * CELL)))
    return [_centre(column + n, row) for n in range(DIGITS)]


def _filled(rng: np.random.Generator, width: int, height: int) -> list[tuple[float, float]]:
    """Lines all over the page, with gaps."""
    cells = itertools.product(range(height // CELL), range(width // CELL))
    return [_centre(column, row) for row, column in cells if rng.random() < 0.7]


def _centre(column: int, row: int) -> tuple[float, float]:
    return CELL * (column + 0.5), CELL * (row + 0.5)


def sizes(rng: np.random.Generator) -> tuple[int, int]:
    """A width and a height."""
    return SIZES[int(rng.integers(len(SIZES)))]


@functools.cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    """**Raises** ImportError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('pages need the fonts of matplotlib: pip install "mmkernels[train]"') from error
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return tuple(ImageFont.truetype(str(folder / f"{name}.ttf"), _LETTER) for name in FONTS)
