"""The default data, which needs no download: handwritten digits of scikit-learn, photographs of scikit-image and scikit-learn.

Held-out digits are other scans than the training ones. Held-out photographs are other cuts of the same photographs: they ask
whether a known scene is recognised in a new framing, not whether an unknown one is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from mmkernels.data.dataset import Dataset, Picture, shrink

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PHOTOGRAPHS = {  # name in scikit-image, or a file of scikit-learn -> what it shows
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "rocket": "a rocket",
    "motorcycle_left.png": "a motorcycle",
    "hubble_deep_field": "distant galaxies",
    "retina": "an eye",
    "coins": "old coins",
    "china.jpg": "a temple",
    "flower.jpg": "a flower",
}
_HELD_OUT = 5  # every fifth scan


def build() -> Dataset:
    """Twenty captions, ten of digits and ten of photographs."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        wheels = "scikit-learn and scikit-image, which hold the pictures"
        raise ImportError(f'--data digits needs {wheels}: pip install "mmkernels[train]"') from error
    scans, labels = sklearn.datasets.load_digits(return_X_y=True)
    digits = [_digit(scan.reshape(8, 8), int(n)) for scan, n in zip(scans, labels, strict=True)]
    photos = [
        _photograph(_read(name, skimage.data, sklearn.datasets), len(_NUMBERS) + i)
        for i, name in enumerate(_PHOTOGRAPHS)
    ]
    return Dataset(
        "digits",
        (*(f"a handwritten {n}" for n in _NUMBERS), *(f"a photograph of {p}" for p in _PHOTOGRAPHS.values())),
        train=_by_caption([d for i, d in enumerate(digits) if i % _HELD_OUT], photos),
        held_out=_by_caption(digits[::_HELD_OUT], photos),
    )


def _by_caption(digits: list[Picture], photos: list[Picture]) -> tuple[tuple[Picture, ...], ...]:
    scans = tuple(tuple(d for d in digits if d.caption == n) for n in range(len(_NUMBERS)))
    return scans + tuple((photo,) for photo in photos)


def _digit(scan: np.ndarray, label: int) -> Picture:
    """A scan of 8 x 8 in 17 greys, with a blank margin of one pixel so that a view may cut off centre."""
    grey = np.pad(scan * (255 / 16), 1).astype(np.uint8)
    large = Image.fromarray(grey).resize((40, 40), Image.Resampling.BICUBIC)
    return Picture(np.asarray(large.convert("RGB")), label, zoom=(0.8, 0.95))


def _photograph(pixels: np.ndarray, caption: int) -> Picture:
    return Picture(shrink(Image.fromarray(pixels).convert("RGB"), 96), caption, flip=True)


def _read(name: str, skimage_data: Any, sklearn_datasets: Any) -> np.ndarray:
    if name.endswith(".jpg"):
        return sklearn_datasets.load_sample_image(name)
    if name.endswith(".png"):
        return np.asarray(Image.open(f"{skimage_data.data_dir}/{name}").convert("RGB"))
    return getattr(skimage_data, name)()
