"""Checkpoints: safetensors and JSON, whole or not there, with all that the next step depends on.

A folder holds `model.safetensors`, `optimizer.safetensors` (moments by parameter name, the head, the generator),
`tokenizer.json`, `run.json` and `checkpoint.json` (step, environment, the files' SHA-256). Batches are numbered, so the step
is the data's position and the schedule's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mmkernels.data import store
from mmkernels.models import weights

MODEL, OPTIMIZER, TOKENIZER, STATE = (
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "checkpoint.json",
)
KEEP = 2  # an older one to fall back on, should the disk spoil the latest


def write(
    out: Path,
    step: int,
    state: dict[str, Any],
    *,
    model: nn.Module,
    tensors: dict[str, Tensor],
    texts: dict[str, str],
) -> Path:
    """Saves a checkpoint of a run and drops old ones; returns its folder."""
    place = store.checkpoint(out, step)
    with store.new_folder(place) as folder:
        weights.save(model, folder / MODEL)
        (folder / OPTIMIZER).write_bytes(save(tensors))
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        sums = {path.name: _sum(path) for path in sorted(folder.iterdir())}
        (folder / STATE).write_text(store.to_json({**state, "step": step, "sha256": sums}), encoding="utf-8")
    store.tidy(out, KEEP)
    return place


def verify(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's `checkpoint.json`. **Raises** ValueError when a file is missing or is not what was written."""
    state = store.read_json(folder / STATE)
    sums = state.get("sha256")
    if not isinstance(sums, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{folder / STATE}: damaged, it names no step or no files")
    for name, expected in sums.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{path}: missing from the checkpoint")
        if _sum(path) != expected:
            raise ValueError(f"{path}: damaged, its content is not what was saved")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """An optimizer's state, flat: `<parameter>.<moment>`."""
    return {
        f"{names[parameter]}.{moment}": value.detach().cpu()
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. **Raises** ValueError for a parameter without its moments."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[parameter]}."
            state = {k[len(prefix) :]: v for k, v in tensors.items() if k.rpartition(".")[0] + "." == prefix}
            if not state:
                raise ValueError(f"{OPTIMIZER}: holds nothing for {prefix[:-1]}")
            step = state.pop("step")  # a counter, which stays where it is: on the CPU
            moved = {moment: value.to(parameter.device) for moment, value in state.items()}
            optimizer.state[parameter] = {"step": step, **moved}


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
