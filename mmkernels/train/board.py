"""A run's records as TensorBoard shows them, beside `log.jsonl`, which stays the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Writes scalars of every step under `<out>/tensorboard`; steps after `step`, which a killed run wrote, are purged.

    **Raises** ImportError without the tensorboard package.
    """

    def __init__(self, out: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard: the package is missing (pip install tensorboard)") from error
        self._writer = SummaryWriter(str(out / FOLDER), purge_step=step + 1)

    def append(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name in ("loss", "rate", "norm"):
            self._writer.add_scalar(name, record[name], step)
        for group in ("losses", "speed", "held_out"):
            for name, value in record.get(group, {}).items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
