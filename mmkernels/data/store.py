"""Files that are whole or not there: written beside their place, flushed to the disk, then moved in one step.

A run keeps its checkpoints as `checkpoints/step-00000200/`; a folder with such a name is complete, for it got the name last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically and durably."""
    raw = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's are for the owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill; when the block ends well, the folder appears as `path`, else nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=path.parent))
    try:
        yield unfinished
        os.chmod(unfinished, 0o755)
        for file in unfinished.iterdir():
            _flush(file)
        _flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _flush(path.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a folder; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing here") from None
        yield
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """**Raises** FileNotFoundError; ValueError when it is not one JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a JSON {type(found).__name__}, expected an object")
    return found


def to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def checkpoint(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps whose checkpoints are complete, in order."""
    folder = run / CHECKPOINTS
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def find_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the latest one of the run in `path`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise ValueError(f"{path}: a file, expected the folder of a run or of a checkpoint")
    if (path / "model.safetensors").is_file():
        return path
    known = steps(path)
    if not known:
        raise FileNotFoundError(f"{path}: holds no checkpoint")
    return checkpoint(path, known[-1])


def tidy(run: Path, keep: int) -> None:
    """Removes all but the `keep` latest checkpoints, and what a killed run left unfinished."""
    for step in steps(run)[:-keep]:
        _remove(checkpoint(run, step))
    for folder in (run, run / CHECKPOINTS):
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _remove(folder: Path) -> None:
    """First gives up the name, so that a half-removed checkpoint is never taken for a whole one."""
    condemned = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
    os.replace(folder, condemned / "old")
    shutil.rmtree(condemned)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
