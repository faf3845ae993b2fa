"""Where tensors come from: a state dict, or safetensors files whose headers are read first and whose tensors one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_LISTED = 8  # names in an error message
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Checkpoint:
    """`shapes` has every key as a tensor without memory; `read(key)` gives its values.

    `prefix`: if any key starts so, only those count, without it.
    """

    def __init__(self, source: Mapping[str, Tensor] | Path, prefix: str = "") -> None:
        self._state = source if isinstance(source, Mapping) else {}
        self._files: dict[str, Path] = {}
        if isinstance(source, Mapping):
            shapes = {key: torch.empty_like(value, device="meta") for key, value in source.items()}
        else:
            shapes = {}
            for file in _files(source):
                header = _header(file)
                twice = sorted(header.keys() & shapes.keys())
                if twice:
                    raise ValueError(
                        f"{file}: has keys that another file of the folder has too: {some(twice)}"
                    )
                shapes |= header
                self._files |= dict.fromkeys(header, file)
        self._prefix = prefix if prefix and any(key.startswith(prefix) for key in shapes) else ""
        self.shapes = {
            k.removeprefix(self._prefix): v for k, v in shapes.items() if k.startswith(self._prefix)
        }

    def read(self, key: str) -> Tensor:
        key = self._prefix + key
        if key in self._state:
            return self._state[key]
        with safe_open(self._files[key], framework="pt") as file:
            return file.get_tensor(key)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: a folder without safetensors files")
    return files


def _header(path: Path) -> dict[str, Tensor]:
    """Every key with its shape and dtype. Lengths and offsets are checked against the file: a cut one does not pass."""
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK" or head[:1] == b"\x80":  # a zip archive of torch.save, or a bare pickle
        raise ValueError(
            f"{path}: a pickle, which can run code when read; `mmkernels convert` makes it safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: _shape(path, key, file.get_slice(key)) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def _shape(path: Path, key: str, part: object) -> Tensor:
    dtype, shape = part.get_dtype(), part.get_shape()  # type: ignore[attr-defined]
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {key} has dtype {dtype}, which no parameter has")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def some(names: list[str]) -> str:
    """The first names of a list that may be long."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
