"""`make room`: the new room passes the whole table's tests before a line of it is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a room needs, so that the repository keeps its own."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("mmkernels", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in (
        "pyproject.toml",
        "tests/test_ops.py",
        "tests/test_architecture.py",
        "setup.py",
        "CMakeLists.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_new_room_works_at_once(copy: Path) -> None:
    made = _python(copy, "tools/room.py", "probe", "ops")
    assert made.returncode == 0, made.stderr
    cheap = "probe and not compiles"  # compiling is the same for every room, and slow
    tested = _python(copy, "-m", "pytest", "-p", "no:cacheprovider", "tests", "-k", cheap)
    assert tested.returncode == 0, tested.stdout
    assert "passed" in tested.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interval_attention"], "there is a room interval_attention already"),
        (["Probe"], "got 'Probe', expected a lower-case Python name"),
        (["probe", "layers"], "got 'layers', expected one of primitives, ops"),
        ([""], "usage: make room NAME=foo"),
    ],
)
def test_a_bad_name_makes_nothing(copy: Path, arguments: list[str], message: str) -> None:
    before = sorted((copy / "mmkernels").rglob("*.py"))
    refused = _python(copy, "tools/room.py", *arguments)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert sorted((copy / "mmkernels").rglob("*.py")) == before
