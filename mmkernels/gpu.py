"""Which GPUs are there, and in one sentence why there is none or why one cannot run the kernels."""

from __future__ import annotations

import torch

OLDEST = (8, 0)  # sm_80: bfloat16 products and asynchronous copies


def names() -> list[str]:
    if why_none():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def why_none() -> str:
    """Why torch has no GPU here; "" when it has one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available() and torch.cuda.device_count():
        return ""
    driver: int = torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]
    if driver == 0:
        return f"no NVIDIA driver is installed; torch {torch.__version__} needs one for CUDA {torch.version.cuda}"
    if driver // 1000 < int(torch.version.cuda.partition(".")[0]):
        return (
            f"the NVIDIA driver is too old: it serves CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"torch {torch.__version__} needs CUDA {torch.version.cuda}"
        )
    return "torch sees no GPU: is CUDA_VISIBLE_DEVICES set?"


def problems() -> list[str]:
    """GPUs that are there and that the kernels cannot use: their ops run the reference."""
    if why_none():
        return []
    found = [(i, torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]
    return [
        f"GPU {i} ({torch.cuda.get_device_name(i)}) is sm_{major}{minor}; the kernels need sm_80 or newer, "
        "so its ops run the reference"
        for i, (major, minor) in found
        if (major, minor) < OLDEST
    ]
