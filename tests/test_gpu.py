"""Why there is no GPU, or why one cannot be used: one sentence each, and the CPU goes on working."""

from __future__ import annotations

import pytest
import torch

from mmkernels import _native, doctor, gpu


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch built for CUDA 13 on a machine whose GPU side each test describes."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return monkeypatch


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (0, "no NVIDIA driver is installed"),
        (12_040, "too old: it serves CUDA 12.4"),
        (13_010, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_missing_gpu_has_a_reason(cuda_torch: pytest.MonkeyPatch, driver: int, said: str) -> None:
    cuda_torch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    assert said in gpu.why_none() and gpu.names() == [] and gpu.problems() == []
    assert doctor.devices()["why_no_gpu"] == gpu.why_none()


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.why_none() == f"torch {torch.__version__} is built without CUDA"


def test_an_old_gpu_is_a_problem_that_says_what_happens(cuda_torch: pytest.MonkeyPatch) -> None:
    cuda_torch.setattr(torch.cuda, "is_available", lambda: True)
    cuda_torch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda_torch.setattr(torch.cuda, "get_device_name", lambda i: ("Tesla V100", "H200")[i])
    cuda_torch.setattr(torch.cuda, "get_device_capability", lambda i: ((7, 0), (9, 0))[i])
    assert gpu.names() == ["Tesla V100", "H200"]
    (problem,) = gpu.problems()
    assert problem.startswith("GPU 0 (Tesla V100) is sm_70; the kernels need sm_80 or newer")
    assert problem in doctor.problems({})


@pytest.mark.parametrize(
    ("nvcc", "why"),
    [("13.0.88", ""), ("12.8.93", "it was compiled for CUDA 12, torch has CUDA 13; build again")],
)
def test_kernels_of_another_cuda_are_refused(cuda_torch: pytest.MonkeyPatch, nvcc: str, why: str) -> None:
    cuda_torch.setattr(_native, "build_info", lambda: {"nvcc": nvcc})
    assert _native._other_cuda() == why
