"""Untrusted pictures become small arrays: the header is judged before anything is decoded.

Only PNG, JPEG and WEBP are opened, only below a pixel cap, only still pictures; a warning of the decoder counts as an error.
Every refusal is an `ImageError` of one sentence that names the file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 32 * 1024 * 1024  # about 100 MB decoded: an 8K photograph passes, a bomb does not
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures
STD = (0.26862954, 0.26130258, 0.27577711)

_WIDE_GREY = ("I;16", "I;16B", "I;16L", "I")  # 16 bits a pixel, or such a file widened by the decoder


class ImageError(ValueError):
    """A picture that is not safe or not possible to read; the message names the file."""


def load(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture from disk as upright 8-bit RGB.

    **Edge** EXIF rotation is applied; palettes, CMYK and grey become RGB; 16-bit grey keeps its high byte; transparency is
    laid over white.
    **Raises** ImageError: missing file, not PNG, JPEG or WEBP, more than `max_pixels` (known from the header, before decoding),
    animated, truncated or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such picture")

    def opened() -> Image.Image:
        with Image.open(path, formats=FORMATS) as image:
            return _still(image, path, max_pixels)

    return _guarded(opened, path)


def read(image: Image.Image, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture that somebody else opened, decoded and judged as `load` does. **Raises** ImageError as `load`."""
    return _guarded(lambda: _still(image, name, max_pixels), name)


def _guarded(decode: Callable[[], Image.Image], path: object) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return decode()
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not a picture that can be read, expected {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise almost anything when bytes are hostile
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise ImageError(f"{path}: damaged or unsafe picture ({reason})") from None


def _still(image: Image.Image, path: object, max_pixels: int) -> Image.Image:
    check_size(image, path, max_pixels)  # before anybody counts frames
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(
            f"{path}: an animation of {getattr(image, 'n_frames', 0)} frames, expected one still picture"
        )
    return upright(image, path, max_pixels)


def check_size(image: Image.Image, path: object, max_pixels: int = MAX_PIXELS) -> None:
    """**Raises** ImageError for an open picture that is too large to decode."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{path}: a picture of {width} x {height}, which has no pixels")
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise ImageError(f"{path}: {size} is more than the {max_pixels:,} pixels that are safe to decode")


def upright(image: Image.Image, path: object, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an open picture, or the frame that it is at, as upright RGB. **Raises** ImageError as `load`."""
    check_size(image, path, max_pixels)
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image), path)


def _to_rgb(image: Image.Image, path: object) -> Image.Image:
    if image.mode in _WIDE_GREY:
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        return image.convert("RGB")
    raise ImageError(f"{path}: pixels of kind {image.mode!r} are not supported")


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of a picture, resized: `[size, size, 3]`. Cuts before it resizes, so a thin strip costs no memory."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """`(pixels / 255 - MEAN) / STD`. **Shapes** uint8 `[..., S, S, 3]` -> float32 `[..., 3, S, S]`, contiguous."""
    scaled = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32).div_(255)
    return scaled.sub_(torch.tensor(MEAN)).div_(torch.tensor(STD)).movedim(-1, -3).contiguous()


def denormalise(x: Tensor) -> NDArray[np.uint8]:
    """The pixels that `normalise` makes x of, rounded and clipped. **Shapes** `[..., 3, S, S]` -> uint8 `[..., S, S, 3]`."""
    scaled = x.detach().float().cpu().movedim(-3, -1) * torch.tensor(STD) + torch.tensor(MEAN)
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def decode(raw: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `load`, of a picture's bytes; messages call it `name`. **Raises** ImageError."""

    def opened() -> Image.Image:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            return _still(image, name, max_pixels)

    return _guarded(opened, name)
