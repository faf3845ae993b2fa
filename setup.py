"""Introduces CMake to setuptools. What is compiled and how stands in CMakeLists.txt, metadata in pyproject.toml."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def find_torch() -> Path | None:
    """The installed torch, never imported. A child that ignores PYTHONPATH looks past the walls of an isolated build."""
    if os.environ.get("MMKERNELS_TORCH"):
        return Path(os.environ["MMKERNELS_TORCH"])
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    found = subprocess.run([sys.executable, "-E", "-c", FIND], capture_output=True, text=True).stdout.strip()
    return Path(found) if found else None


def why_not(mode: str, torch: Path | None) -> str:
    """The reason to compile nothing, "" when there is none."""
    if mode == "none":
        return "MMKERNELS_BUILD=none"
    if torch is None or not (torch / "version.py").is_file():
        return f"no torch was found ({torch or 'name its folder in MMKERNELS_TORCH'}); it is looked for, never fetched"
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    if version is None or (int(version[1]), int(version[2])) < (2, 11):
        return f"{torch} is not torch >= 2.11"
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return "" if any(c and shutil.which(c.split()[0]) for c in compilers) else "no C++ compiler was found"


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode = os.environ.get("MMKERNELS_BUILD") or "auto"
        if mode not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"MMKERNELS_BUILD: got {mode!r}, expected auto, cpu, cuda or none")
        out = ROOT / "mmkernels" if self.inplace else Path(self.build_lib).resolve() / "mmkernels"
        for stale in (*out.glob("_C_*.so"), *out.glob("_host*.so")):
            stale.unlink()
        torch = find_torch()
        reason = why_not(mode, torch)
        if reason and mode in ("cpu", "cuda"):
            raise SystemExit(f"MMKERNELS_BUILD={mode}: {reason}")
        if reason:
            print(f"mmkernels: nothing is compiled, every operator runs its reference: {reason}", file=sys.stderr)
            out.mkdir(parents=True, exist_ok=True)
            info = {"modules": [], "skipped": dict.fromkeys(("_C_cpu", "_C_cuda", "_host"), reason)}
            (out / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        else:
            host = "OFF" if getattr(self.distribution.get_command_obj("bdist_wheel"), "py_limited_api", "") else "ON"
            self.cmake(out, f"-DMMKERNELS_BUILD={mode}", f"-DMMKERNELS_TORCH={torch}", f"-DMMKERNELS_HOST={host}")

    def cmake(self, out: Path, *defines: str) -> None:
        build = Path(self.build_temp).resolve()
        tools = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *tools, *defines], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(out)], check=True)


setup(ext_modules=[Extension("mmkernels._C", [])], cmdclass={"build_ext": CMakeBuild})
