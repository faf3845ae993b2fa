"""Pages of rendered text, of many sizes, whose words are known: what is written on them can be checked letter by letter.

A page is a light ground of its own colour with a number of `DIGITS` digits in dark ink, in one of the DejaVu fonts that come
with matplotlib, somewhere in its central square. The size of the letters does not follow the size of the page: on a large page
they are small. Numbers are held out by their digits, so a held-out one was never read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

DIGITS = 2
QUESTION = "what is written?"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
SIDES = (32, 96)  # of a page, in pixels; its area is at most that of a square of 64
_AREA = 64 * 64
_LETTER = 11  # pixels of the font
_STEP = 9  # from a letter to the next one
_HELD_OUT = 5


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


def page(rng: np.random.Generator, *, held_out: bool = False, size: tuple[int, int] | None = None) -> Page:
    """A page of a given or a random size (width, height)."""
    width, height = size or sizes(rng)
    digits = number(rng, held_out=held_out)
    ground, ink = rng.integers(200, 256, size=3), rng.integers(0, 90, size=3)
    image = Image.new("RGB", (width, height), tuple(int(c) for c in ground))
    draw, font = ImageDraw.Draw(image), _fonts()[int(rng.integers(len(FONTS)))]
    side = min(width, height)
    reach = _STEP * (len(digits) - 1)
    x = (width - side) / 2 + rng.uniform(_STEP / 2, side - _STEP / 2 - reach)
    y = (height - side) / 2 + rng.uniform(_STEP / 2 + 1, side - _STEP / 2 - 1)
    centres = tuple((x + _STEP * n, y) for n in range(len(digits)))
    for digit, centre in zip(digits, centres, strict=True):
        draw.text(centre, str(digit), font=font, fill=tuple(int(c) for c in ink), anchor="mm")
    return Page(np.asarray(image), digits, centres)


def number(rng: np.random.Generator, *, held_out: bool) -> tuple[int, ...]:
    """Digits with equal chances; a fifth of all numbers is held out, each digit being known in every place."""
    while True:
        digits = tuple(int(d) for d in rng.integers(10, size=DIGITS))
        if (sum((n + 1) * d for n, d in enumerate(digits)) % _HELD_OUT == 0) == held_out:
            return digits


def sizes(rng: np.random.Generator) -> tuple[int, int]:
    """A width and a height."""
    while True:
        width, height = (int(n) for n in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
        if width * height <= _AREA:
            return width, height


@functools.cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    """**Raises** ImportError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('pages need the fonts of matplotlib: pip install "mmkernels[train]"') from error
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return tuple(ImageFont.truetype(str(folder / f"{name}.ttf"), _LETTER) for name in FONTS)
