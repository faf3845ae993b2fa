"""A batch of pictures, sliced by a published rule, as packed rows of normalised patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkernels import _native
from mmkernels.data import images, slicing
from mmkernels.data.front_end import jobs, pillow
from mmkernels.data.images import MEAN, STD, ImageError
from mmkernels.data.slicing import Plan

Picture = str | Path | Image.Image | NDArray[np.uint8] | None


class Rule(NamedTuple):
    """How a family slices and prepares: its plan with what it fixes, its jobs, patch, mean and standard deviation."""

    plan: Callable[..., Any]
    fixed: dict[str, Any]
    jobs: Callable[[int, Plan, int], list[jobs.Job]]
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


RULES = {
    "llava_next": Rule(slicing.llava_next, {}, jobs.tiled, 14, MEAN, STD),
    "llava_uhd": Rule(slicing.llava_uhd, {"release": "original"}, jobs.original, 14, (0, 0, 0), (1, 1, 1)),
    "llava_uhd_eccv": Rule(slicing.llava_uhd, {"release": "eccv"}, jobs.eccv, 14, MEAN, STD),
    "monkey": Rule(slicing.monkey, {}, jobs.windows, 14, MEAN, STD),
    "fuyu": Rule(slicing.fuyu, {}, jobs.patches, 30, (0.5,) * 3, (0.5,) * 3),
    "slime": Rule(slicing.slime, {}, jobs.tiled, 14, MEAN, STD),
}
DTYPES = {torch.float32: "", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Packed:
    """A batch, ready for a packed tower.

    `patches` `[N, 3 p²]`: the rows of all views in the order of the batch. `hw` int64 `[V, 2]`: each view's rows and columns of
    patches; its rows are `offsets[v] : offsets[v + 1]`, int32 `[V + 1]`; `sample` int64 `[V]`: whose it is. `plans[b]` is None
    where sample b has no picture, or none that can be used: `errors[b]` then says why.
    """

    patches: Tensor
    hw: Tensor
    offsets: Tensor
    sample: Tensor
    plans: list[Plan | None]
    errors: dict[int, str]


class FrontEnd:
    """Slices, resizes, pads, normalises and cuts a batch of pictures into rows of patches, as `rule` was published.

    `row = (pixel / 255 - mean) / std`, ordered (channel, y, x) within a patch; `fuyu`: (y, x, channel).

    **Shapes** a sequence of B pictures, each a path, a PIL image, uint8 `[H, W, 3]` or `[H, W]`, or None for a sample without
    one -> `Packed`. **Dtypes** float32; bfloat16 and float16 are its values rounded.
    **Edge** Files are read as `images.load` reads them. What is wrong with one picture (unreadable, a bomb, more than `most`
    slices, more tokens than `context` leaves beside its text) is in `errors`, and the others are there; with
    `on_error="raise"` it is raised. A batch without a picture has no rows.
    **Raises** ValueError, TypeError: an unknown rule, dtype or argument. ImageError: see above.
    **Source** as the plans of `mmkernels.data.slicing`; github.com/python-pillow/Pillow `Resample.c`.
    **Speed** `threads` (default: torch's) share the pictures of a batch; the interpreter is free meanwhile. Without the
    compiled `_host`, Pillow and numpy do the same. On another `device` the bytes go there as they are and Triton does the rest.
    """

    def __init__(
        self,
        rule: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        most: int = 64,
        context: int | None = None,
        on_error: str = "keep",
        **plan: Any,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
        if on_error not in ("keep", "raise"):
            raise ValueError(f"on_error: got {on_error!r}, expected 'keep' or 'raise'")
        self.rule = RULES[rule]
        self.options = {**self.rule.fixed, **plan}
        self.patch = self.options.get("patch", self.rule.patch)
        self.rule.plan(1, 1, **self.options)  # wrong options are the caller's, not a picture's
        self.dtype, self.device = dtype, torch.device(device)
        self.most, self.context, self.on_error = most, context, on_error
        self.table, self.affine = normalisation(mean or self.rule.mean, std or self.rule.std, dtype)

    def plan(self, width: int, height: int, text: int = 0) -> Plan:
        """The plan of one picture. **Raises** ValueError for more slices or tokens than are allowed."""
        plan = self.rule.plan(width, height, **self.options)
        if self.rule.jobs is not jobs.patches:
            slicing.check_slices(plan, self.most)
        if self.context is not None:
            slicing.check_context(plan.tokens, self.context, text)
        return plan

    def __call__(
        self, pictures: Sequence[Picture], *, text_tokens: Sequence[int] = (), threads: int = 0
    ) -> Packed:
        if text_tokens and len(text_tokens) != len(pictures):
            raise ValueError(f"text_tokens: got {len(text_tokens)}, expected {len(pictures)}, one a picture")
        if isinstance(pictures, str | Path | Image.Image):
            raise TypeError(f"pictures: got one {type(pictures).__name__}, expected a sequence of pictures")
        pixels: list[NDArray[np.uint8]] = []
        plans: list[Plan | None] = []
        errors: dict[int, str] = {}
        todo: list[jobs.Job] = []
        views: list[tuple[int, int]] = []
        sample: list[int] = []
        rows = 0
        for at, picture in enumerate(pictures):
            plans.append(None)
            if picture is None:
                continue
            try:
                array = decode(picture, f"picture {at}")
                plan = self.plan(array.shape[1], array.shape[0], text_tokens[at] if text_tokens else 0)
            except ValueError as error:  # an ImageError too
                errors[at] = str(error)
                continue
            plans[at] = plan
            for job in self.rule.jobs(len(pixels), plan, self.patch):
                placed, made = job.placed(rows)
                todo.append(placed)
                views += made
                sample += [at] * len(made)
                rows += sum(h * w for h, w in made)
            pixels.append(array)
        if errors and self.on_error == "raise":
            raise ImageError("; ".join(f"sample {at}: {why}" for at, why in errors.items()))
        patches = torch.empty(rows, 3 * self.patch**2, dtype=self.dtype, device=self.device)
        self._fill(pixels, todo, patches, threads)
        hw = torch.tensor(views, dtype=torch.int64).reshape(-1, 2)
        offsets = torch.cat([hw.new_zeros(1), hw.prod(1).cumsum(0)]).to(torch.int32)
        return Packed(patches, hw, offsets, torch.tensor(sample, dtype=torch.int64), plans, errors)

    def _fill(self, pixels: list[NDArray[np.uint8]], todo: list[jobs.Job], out: Tensor, threads: int) -> None:
        host = _native.host
        if out.device.type != "cpu":
            self._on_device(pixels, todo, out)
            return
        if host is None:
            pillow.run(pixels, todo, self.table, self.affine, out)
            return
        bits = out if out.dtype == torch.float32 else out.view(torch.uint16)
        host.front_end(
            pixels, jobs.table(todo), self.table, *self.affine, bits.numpy(), DTYPES[self.dtype],
            threads or torch.get_num_threads(),
        )  # fmt: skip

    def _on_device(self, pixels: list[NDArray[np.uint8]], todo: list[jobs.Job], out: Tensor) -> None:
        from mmkernels.data.front_end.triton import launch  # only here: Triton may not be installed

        table = torch.from_numpy(self.table).view(self.dtype).float().to(out.device)
        launch.run(pixels, todo, table, torch.from_numpy(self.affine).float().to(out.device), out)


def normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """What a byte becomes, `[3, 256]` in the bits of `dtype`, and (scale, shift) `[2, 3]` of values that are no bytes.

    **Raises** ValueError: not three numbers each, or a standard deviation that is not above zero.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean, std: got {mean}, {std}, expected three numbers each, std above 0")
    byte = np.arange(256, dtype=np.float32) / np.float32(255)
    centre, width = np.array(mean, dtype=np.float64), np.array(std, dtype=np.float64)
    table = (byte - centre.astype(np.float32)[:, None]) / width.astype(np.float32)[:, None]
    affine = np.stack([1 / (255 * width), -centre / width])
    if dtype == torch.float32:
        return np.ascontiguousarray(table), affine
    return torch.from_numpy(table).to(dtype).view(torch.uint16).contiguous().numpy(), affine


def decode(picture: Picture, name: str) -> NDArray[np.uint8]:
    """uint8 `[H, W, 3]` of a path, a PIL image or an array. **Raises** ImageError."""
    if isinstance(picture, str | Path):
        return np.asarray(images.load(picture))
    if isinstance(picture, Image.Image):
        return np.asarray(images.read(picture, name))
    if not isinstance(picture, np.ndarray):
        kinds = "a path, a PIL image, uint8 [H, W, 3] or [H, W], or None"
        raise ImageError(f"{name}: got {type(picture).__name__}, expected {kinds}")
    if (
        picture.dtype != np.uint8
        or picture.ndim not in (2, 3)
        or (picture.ndim == 3 and picture.shape[2] != 3)
    ):
        got = f"{picture.dtype} {list(picture.shape)}"
        raise ImageError(f"{name}: got {got}, expected uint8 [H, W, 3] or [H, W]")
    if not picture.size:
        raise ImageError(
            f"{name}: got a picture of {picture.shape[1]} x {picture.shape[0]}, which has no pixels"
        )
    if picture.shape[0] * picture.shape[1] > images.MAX_PIXELS:
        size = f"{picture.shape[1]} x {picture.shape[0]} pixels"
        raise ImageError(f"{name}: {size} is more than the {images.MAX_PIXELS:,} pixels that are allowed")
    whole = picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, 2)
    return np.ascontiguousarray(whole)
