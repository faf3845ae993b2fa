"""Ranges reach a real NVTX tool, name op, backend and shapes, and are off unless asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvtx")

PROGRAM = """
import torch, mmkernels
q, k = torch.randn(5, 2, 64), torch.randn(7, 2, 64)
lo, hi = torch.zeros(5, dtype=torch.int32), torch.full((5,), 7, dtype=torch.int32)
step = torch.compile(mmkernels.interval_attention, backend="aot_eager", fullgraph=True)
with mmkernels.using("reference"):
    mmkernels.interval_attention(q, k, k, lo, hi)
    step(q, k, k, lo, hi)
"""


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    source = Path(__file__).with_name("nvtx_recorder.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def _ranges(tool: Path, folder: Path, wanted: str) -> list[str]:
    record = folder / "ranges.txt"
    told = {"NVTX_INJECTION64_PATH": str(tool), "NVTX_RECORD": str(record), "MMKERNELS_NVTX": wanted}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=os.environ | told)
    return record.read_text().splitlines() if record.is_file() else []


def test_every_call_is_one_range_compiled_or_not(tool: Path, tmp_path: Path) -> None:
    shapes = "float32[1, 5, 2, 64] float32[1, 7, 2, 64] float32[1, 7, 2, 64] int32[1, 5] int32[1, 5]"
    one = [f"mmkernels: interval_attention reference {shapes}", "mmkernels: end"]
    assert _ranges(tool, tmp_path, "1") == 2 * one


def test_ranges_are_off_by_default(tool: Path, tmp_path: Path) -> None:
    assert _ranges(tool, tmp_path, "0") == []
