"""Checkpoints: published key names in, our own names out; safetensors only, strict, and nothing half done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table

_OWN = Table((Rule("(.+)", ("{0}",)),))
_LISTED = 8  # names in an error message


def load(
    module: nn.Module,
    state_dict_or_path: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    source: str | None = None,
) -> None:
    """Copies a checkpoint into `module`, in place.

    `source` names the authors whose keys the checkpoint has (`module.sources` lists them; bare keys, as the module's own
    `state_dict()` would start); None means our names. A path is a safetensors file, or a folder whose safetensors files make
    up one checkpoint.

    **Edge** strict: nothing is touched unless every parameter is there, has its shape and a floating dtype, and no key is left
    over (a whole model's `source` names what its files may lack). Values are converted to the parameter's dtype and device.
    **Raises** ValueError for what is missing, left over or misshapen, for unknown sources and for files that are not
    safetensors; FileNotFoundError.
    """
    table = _table(module, source)
    given = state_dict_or_path
    state = _within(table.within, dict(given) if isinstance(given, Mapping) else _read(Path(given)))
    targets = module.state_dict()
    values, used, missing = {}, set(), []
    for name in targets:
        keys, value = _collect(table, name, state)
        if value is not None:
            values[name] = value
            used.update(keys)
        elif not _matches(table.absent, name):
            missing.extend(key for key in keys if key not in state)
    left = [key for key in state if key not in used and not _matches(table.ignored, key)]
    wrong = [problem for name, value in values.items() if (problem := _mismatch(name, value, targets[name]))]
    _refuse(module, source, missing, left, wrong)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def _table(module: nn.Module, source: str | None) -> Table:
    if source is None:
        return _OWN
    known = getattr(module, "sources", ())
    if source not in known:
        expected = ", ".join(map(repr, known)) or "None only"
        raise ValueError(f"source: got {source!r} for {type(module).__name__}, expected {expected}")
    return module.published(source)  # type: ignore[operator]


def _within(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a whole system's file that is about the module; a file of the module alone as it is."""
    inner = {
        key.removeprefix(prefix): value for key, value in state.items() if prefix and key.startswith(prefix)
    }
    return inner or state


def _collect(table: Table, name: str, state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor | None]:
    """The published keys of our parameter `name` and, if all are there, its value: by the first rule that finds its keys."""
    alternatives = [(keys, rule) for rule in table.rules if (keys := rule.sources(name)) is not None]
    for keys, rule in alternatives:
        if all(key in state for key in keys):
            return keys, rule.value([state[key] for key in keys])
    return (alternatives[0][0] if alternatives else (f"(nothing published for {name})",)), None


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _mismatch(name: str, value: Tensor, target: Tensor) -> str:
    if value.shape != target.shape:
        return f"{name} has shape {list(value.shape)}, expected {list(target.shape)}"
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        return f"{name} has dtype {value.dtype}, expected {target.dtype} or what converts to it"
    return ""


def _refuse(
    module: nn.Module, source: str | None, missing: list[str], left: list[str], wrong: list[str]
) -> None:
    problems = (("missing", missing), ("left over", left), ("misshapen", wrong))
    found = [f"{title}: {_some(names)}" for title, names in problems if names]
    if found:
        what = f"{type(module).__name__} from {source or 'our own names'}"
        raise ValueError(f"state_dict: does not fit {what}; nothing was loaded. {'; '.join(found)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: a folder without safetensors files")
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = _read_file(file)
        twice = sorted(set(tensors) & set(state))
        if twice:
            raise ValueError(f"{file}: has keys that another file of the folder has too: {_some(twice)}")
        state.update(tensors)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] == b"PK" or head[:1] == b"\x80":  # zip archive of torch.save, or a bare pickle
        raise ValueError(
            f"{path}: a pickle, which can run code when read; `mmkernels convert` makes it safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def save(
    module_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes parameters and buffers under our own names, all or nothing: a file appears complete, or is not touched."""
    state = module_or_state.state_dict() if isinstance(module_or_state, nn.Module) else module_or_state
    # clones: safetensors refuses tensors that share memory, as tied or sliced parameters do
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=dict(metadata or {}))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Turns an authors' .pt or .bin file into safetensors and returns the keys written.

    The file is unpickled in a process of its own, which knows tensors and plain containers and refuses anything else. Tensors
    may lie under "model_state_dict", "state_dict" or "model"; a leading "module." is dropped.
    **Raises** ValueError for other content; FileNotFoundError.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    command = [sys.executable, "-m", "mmkernels.models.unpickle", os.fspath(source), os.fspath(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise ValueError(f"{source}: cannot be converted ({reason[-1] if reason else 'no reason given'})")
    return json.loads(done.stdout)
