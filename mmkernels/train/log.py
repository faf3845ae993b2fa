"""`log.jsonl`: one line of JSON a step. After a resume it reads as if the run had never stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmkernels.data import store

NAME = "log.jsonl"


class Log:
    """Appends records; on opening forgets those after `step`, which a killed run wrote and the resumed one writes again."""

    def __init__(self, out: Path, step: int) -> None:
        path = out / NAME
        kept = [record for record in read(out) if record["step"] <= step]
        store.write(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def flush(self) -> None:
        """To the disk: a checkpoint's steps must be in the log before the checkpoint is."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(out: Path) -> list[dict[str, Any]]:
    """A run's records; a last line that was cut short by a kill is left out."""
    path = out / NAME
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[
        :-1
    ]  # what follows the last line's end is no whole line
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: damaged, a line is not JSON ({error})") from None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"
