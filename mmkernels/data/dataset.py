"""A dataset is captions and pictures held in memory; a *view* is a random square cut out of a picture.

Every draw is a pure function of the generator it is given, so a batch is known by its seed and its number, and training can
continue at any step without replaying the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CELLS = 4  # the free room of a cut is a checkerboard of 4 x 4 cells


@dataclass(frozen=True)
class Picture:
    """A picture, its caption's number, and how views are cut: the side is `zoom[0]` to `zoom[1]` of the shorter side."""

    pixels: NDArray[np.uint8]  # [height, width, 3]
    caption: int
    zoom: tuple[float, float] = (0.6, 0.9)
    flip: bool = False


@dataclass(frozen=True)
class Dataset:
    """Captions with their pictures, training and held out: `train[c]` and `held_out[c]` are the pictures of caption c."""

    name: str
    captions: tuple[str, ...]
    train: tuple[tuple[Picture, ...], ...]
    held_out: tuple[tuple[Picture, ...], ...]

    def draw(self, rng: np.random.Generator, size: int, *, held_out: bool) -> tuple[NDArray[np.uint8], int]:
        """A caption with equal chances, one of its pictures, and a view of it `[size, size, 3]`."""
        caption = int(rng.integers(len(self.captions)))
        pictures = (self.held_out if held_out else self.train)[caption]
        picture = pictures[int(rng.integers(len(pictures)))]
        return view(picture, rng, size, held_out=held_out), caption


def view(picture: Picture, rng: np.random.Generator, size: int, *, held_out: bool) -> NDArray[np.uint8]:
    """Cuts a random square out of a picture and resizes it to `[size, size, 3]`.

    The corner of a training view lies on a black cell of a checkerboard over the free room, that of a held-out view on a white
    one: no cut is ever in both, even where both come from the same picture.
    """
    height, width, _ = picture.pixels.shape
    side = rng.uniform(*picture.zoom) * min(height, width)
    cells = rng.integers(_CELLS, size=2)
    cells[1] ^= (cells.sum() + held_out) & 1  # flips the cell's colour where it is the other split's
    left, top = (cells + rng.random(2)) / _CELLS * (width - side, height - side)
    image = Image.fromarray(picture.pixels)
    cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if picture.flip and rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(cut)


def shrink(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """A picture in memory at the size that views need: its shorter side becomes `side` unless it is smaller."""
    factor = min(1.0, side / min(image.size))
    width, height = (max(1, round(x * factor)) for x in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
