"""Real frame sequences: the pages of a TIFF, an animation, or a folder of still pictures in the order of their names.

They are untrusted as pictures are: every frame is judged by `images`, and only as many are decoded as are asked for.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from mmkernels.data import images
from mmkernels.data.images import ImageError

FORMATS = ("TIFF", "GIF", "WEBP", "PNG")
MAX_FRAMES = 3600  # an hour at a frame a second
_STILLS = (".png", ".jpg", ".jpeg", ".webp")


def load(path: str | Path, count: int | None = None) -> list[Image.Image]:
    """The frames of a video as upright 8-bit RGB; `count` of them, evenly spaced with the first and the last, or all.

    **Edge** fewer frames than `count`: all of them. **Raises** ImageError: no such file, nothing to see in it, more than
    `MAX_FRAMES` frames without a count, and whatever makes a single picture unsafe; ValueError for counts out of range.
    """
    path = Path(path)
    if count is not None and not 1 <= count <= MAX_FRAMES:
        raise ValueError(f"frames: got {count}, expected 1 to {MAX_FRAMES}")
    if path.is_dir():
        stills = sorted(p for p in path.iterdir() if p.suffix.lower() in _STILLS)
        return [images.load(stills[i]) for i in _chosen(path, len(stills), count)]
    if not path.is_file():
        raise ImageError(f"{path}: no such video")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _pages(path, count)
    except ImageError:
        raise
    except Exception as error:  # decoders raise almost anything when bytes are hostile
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise ImageError(f"{path}: not a sequence of pictures that can be read ({reason})") from None


def _pages(path: Path, count: int | None) -> list[Image.Image]:
    found = []
    with Image.open(path, formats=FORMATS) as video:
        for page in _chosen(path, getattr(video, "n_frames", 1), count):
            video.seek(page)
            found.append(images.upright(video, path))
    return found


def _chosen(path: Path, frames: int, count: int | None) -> list[int]:
    if not frames:
        raise ImageError(f"{path}: holds no picture, expected some that end in {', '.join(_STILLS)}")
    if count is None and frames > MAX_FRAMES:
        raise ImageError(
            f"{path}: {frames} frames, expected at most {MAX_FRAMES}, or a number of frames to take"
        )
    count = frames if count is None else min(count, frames)
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()
