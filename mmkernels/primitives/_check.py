"""Argument checks with one voice: which argument, what came, what was expected. They read shapes, never values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmkernels.primitives import _autocast

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shapes(**arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Checks tensors against letters ("B T C"; a digit is itself) and returns the size that each letter took.

    >>> shapes(x=(torch.ones(2, 3), "T C"), w=(torch.ones(5, 3), "N C"))
    {'T': 2, 'C': 3, 'N': 5}
    """
    sizes: dict[str, int] = {}
    for name, (value, letters) in arguments.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: got {type(value).__name__}, expected a tensor [{', '.join(letters.split())}]"
            )
        _match(name, value, letters.split(), sizes)
    return sizes


def _match(name: str, value: Tensor, letters: list[str], sizes: dict[str, int]) -> None:
    expected = f"[{', '.join(letters)}]"
    if value.dim() != len(letters):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected {len(letters)} dimensions {expected}"
        )
    for letter, size in zip(letters, value.shape, strict=True):
        known = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        if size != known:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected {expected} with {letter} = {known}"
            )


def dtypes(allowed: Iterable[torch.dtype], **arguments: Tensor | None) -> None:
    """Every tensor has an allowed dtype, the same one for all."""
    allowed, first = tuple(allowed), None
    for name, value in arguments.items():
        if value is None:
            continue
        if value.dtype not in allowed:
            raise TypeError(f"{name}: got {value.dtype}, expected {' or '.join(str(d) for d in allowed)}")
        if first is not None and value.dtype != first[1]:
            raise TypeError(f"{name}: got {value.dtype}, expected {first[1]} like {first[0]}")
        first = first or (name, value.dtype)


def devices(**arguments: Tensor | None) -> None:
    """Every tensor lives on the same device."""
    first = None
    for name, value in arguments.items():
        if value is None:
            continue
        if first is not None and value.device != first[1]:
            raise TypeError(f"{name}: got device {value.device}, expected {first[1]} like {first[0]}")
        first = first or (name, value.device)


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value <= 0:
            raise ValueError(f"{name}: got {value}, expected a positive integer")


def intervals(lo: Tensor, hi: Tensor, keys: int) -> None:
    """Reads values: 0 <= lo <= hi <= keys on every row. Runs on CPU always, elsewhere under MMKERNELS_CHECK=1."""
    wrong = (lo < 0) | (lo > hi) | (hi > keys)
    if bool(wrong.any()):
        row = int(wrong.flatten().to(torch.uint8).argmax())
        got = (int(lo.flatten()[row]), int(hi.flatten()[row]))
        raise ValueError(f"lo, hi: row {row} has (lo, hi) = {got}, expected 0 <= lo <= hi <= {keys} keys")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under `torch.autocast` floating tensors take its dtype, as a library product's operands would; else unchanged."""
    device = next(t.device.type for t in tensors if t is not None)
    dtype = _autocast.dtype(device)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)
