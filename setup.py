"""Introduces CMake to setuptools: what is compiled and how stands in CMakeLists.txt, metadata in pyproject.toml."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def find_torch() -> str:
    """Folder of the installed torch, never imported; a child ignores the PYTHONPATH that walls in an isolated build."""
    child = [sys.executable, "-E", "-c", FIND]
    named = os.environ.get("MMKERNELS_TORCH")
    return named or subprocess.run(child, capture_output=True, text=True).stdout.strip()


def why_not(mode: str, torch: str) -> str:
    """The reason to compile nothing, "" when there is none."""
    if mode == "none":
        return "MMKERNELS_BUILD=none"
    if not torch:
        return "no installed torch was found, and none is fetched (MMKERNELS_TORCH may name its folder)"
    file = Path(torch, "version.py")
    version = re.search(r"__version__ = '(\d+)\.(\d+)", file.read_text() if file.is_file() else "")
    if version is None or (int(version[1]), int(version[2])) < (2, 11):
        return f"{torch} is not torch 2.11 or later"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return "" if any(c and shutil.which(c.split()[0]) for c in compilers) else "no C++ compiler was found"


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode, torch = os.environ.get("MMKERNELS_BUILD") or "auto", find_torch()
        out = ROOT / "mmkernels" if self.inplace else Path(self.build_lib).resolve() / "mmkernels"
        reason = why_not(mode, torch)
        if reason and mode not in ("auto", "none"):
            raise SystemExit(f"MMKERNELS_BUILD={mode}: {reason}")
        if reason:
            print(f"mmkernels: nothing is compiled, operators run their reference: {reason}", file=sys.stderr)
            info = {"modules": dict.fromkeys(("_C_cpu", "_C_cuda", "_host"), reason)}
            out.mkdir(parents=True, exist_ok=True)
            (out / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        else:
            self.cmake(out, MMKERNELS_BUILD=mode, MMKERNELS_TORCH=torch, Python_EXECUTABLE=sys.executable)
        for name, why in json.loads((out / "_build_info.json").read_text())["modules"].items():
            for stale in out.glob(f"{name}.*so") if why else ():
                stale.unlink()

    def cmake(self, out: Path, **options: str) -> None:
        # An abi3 wheel (bdist_wheel --py-limited-api cp310) holds nothing that is tied to one Python version.
        host = "" if getattr(self.get_finalized_command("bdist_wheel"), "py_limited_api", "") else "ON"
        options |= {"CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "", "MMKERNELS_HOST": host}
        flags = [f"-D{name}={value}" for name, value in options.items()]
        build = str(Path(self.build_temp).resolve())
        subprocess.run(["cmake", "-S", str(ROOT), "-B", build, "-GNinja", *flags], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", str(out)], check=True)


setup(ext_modules=[Extension("mmkernels._C", [])], cmdclass={"build_ext": CMakeBuild})
