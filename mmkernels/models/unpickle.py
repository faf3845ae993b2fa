"""What the process behind `weights.convert` runs: apart, so that a bad file ends nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from mmkernels.models.weights import save

_NESTS = ("model_state_dict", "state_dict", "model")


def tensors(content: object) -> dict[str, Tensor]:
    """The flat state dict in a checkpoint's content."""
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"holds a {type(content).__name__}, expected a dict of tensors")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"holds other things than tensors: {', '.join(others[:8])}")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def main(source: str, target: str) -> None:
    try:
        # the only torch.load of the library: tensors and plain containers, nothing that could run
        content = torch.load(source, map_location="cpu", weights_only=True)
        state = tensors(content)
        save(state, target)
    except Exception as error:
        sys.exit(" ".join(str(error).split())[:400])
    print(json.dumps(list(state)))
