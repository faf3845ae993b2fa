"""Checkpoints: published key names in, our own names out; safetensors only, strict, and nothing half done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.models.checkpoint import Checkpoint, some

_OWN = Table((Rule("(.+)", ("{0}",)),))


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
    over (a whole model's `source` names what its files may lack). Values are converted to the parameter's dtype and device;
    files are read one tensor at a time.
    **Raises** ValueError for what is missing, left over or misshapen, for unknown sources and for files that are not
    safetensors; FileNotFoundError.
    """
    table, given = _table(module, source), state_dict_or_path
    checkpoint = Checkpoint(given if isinstance(given, Mapping) else Path(given), table.within)
    plan = _plan(module, source, table, checkpoint.shapes)
    targets = module.state_dict()
    with torch.no_grad():
        for name, (rule, keys) in plan.items():
            targets[name].copy_(rule.value([checkpoint.read(key) for key in keys]))


Plan = dict[
    str, tuple[Rule, tuple[str, ...]]
]  # our parameter -> the rule that makes it, the published keys it takes


def _table(module: nn.Module, source: str | None) -> Table:
    if source is None:
        return _OWN
    known = getattr(module, "sources", ())
    if source not in known:
        expected = ", ".join(map(repr, known)) or "None only"
        raise ValueError(f"source: got {source!r} for {type(module).__name__}, expected {expected}")
    return module.published(source)  # type: ignore[operator]


def _plan(module: nn.Module, source: str | None, table: Table, shapes: Mapping[str, Tensor]) -> Plan:
    """How every parameter is made. **Raises** ValueError, with everything that is wrong, unless all of it can be done."""
    plan: Plan = {}
    missing, wrong, used = [], [], set()
    for name, target in module.state_dict().items():
        ways = [(rule, keys) for rule in table.rules if (keys := rule.sources(name)) is not None]
        way = next((w for w in ways if all(key in shapes for key in w[1])), None)
        if way is not None:
            plan[name] = way
            used.update(way[1])
            wrong += _mismatch(name, way[0], [shapes[key] for key in way[1]], target)
        elif not _matches(table.absent, name):
            missing += (
                [key for key in ways[0][1] if key not in shapes]
                if ways
                else [f"(nothing published for {name})"]
            )
    left = [key for key in shapes if key not in used and not _matches(table.ignored, key)]
    problems = (("missing", missing), ("left over", left), ("misshapen", wrong))
    found = [f"{title}: {some(names)}" for title, names in problems if names]
    if found:
        what = f"{type(module).__name__} from {source or 'our own names'}"
        raise ValueError(f"state_dict: does not fit {what}; nothing was loaded. {'; '.join(found)}")
    return plan


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _mismatch(name: str, rule: Rule, parts: list[Tensor], target: Tensor) -> list[str]:
    try:
        value = rule.value(parts)
    except (RuntimeError, IndexError):
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        return [f"{name} cannot be made of {shapes}, expected {list(target.shape)} in all"]
    if value.shape != target.shape:
        return [f"{name} has shape {list(value.shape)}, expected {list(target.shape)}"]
    if value.is_floating_point() != target.is_floating_point() or value.is_complex():
        return [f"{name} has dtype {value.dtype}, expected {target.dtype} or what converts to it"]
    return []


def save(
    module_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes parameters and buffers under our own names, all or nothing: a file appears complete, or is not touched."""
    state = module_or_state.state_dict() if isinstance(module_or_state, nn.Module) else module_or_state
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(_apart(state), temporary, metadata=dict(metadata or {}))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another or with more than itself: safetensors refuses such."""
    apart, seen = {}, set()
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        apart[key] = value
    return apart


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Turns an authors' .pt or .bin file into safetensors and returns the keys written.

    The file is unpickled in a process of its own, which knows tensors and plain containers and refuses anything else. Tensors
    may lie under "model_state_dict", "state_dict" or "model"; a leading "module." is dropped.
    **Raises** ValueError for other content; FileNotFoundError.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    # isolated, and with this process's own path: a module beside the file that is converted must not be imported
    code = f"import sys; sys.path[:] = {sys.path!r}; from mmkernels.models.unpickle import main; main(*sys.argv[1:])"
    command = [sys.executable, "-I", "-c", code, os.fspath(source), os.fspath(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise ValueError(f"{source}: cannot be converted ({reason[-1] if reason else 'no reason given'})")
    return json.loads(done.stdout)
