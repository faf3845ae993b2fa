"""Makes the repository's virtual environment from any Python 3.10+ that has pip: `python tools/environment.py .venv`.

A torch >= 2.11 that this Python already has is reused, since it is large and fits the machine's GPU; otherwise torch 2.13.0 is
installed. Then come the development dependencies. Run again, it only adds what is missing. Standard library alone: nothing
else is there yet.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TRITON = "triton==3.6.0"  # a CPU torch brings none, but its interpreter and its compiler need no GPU
COMMANDS = ("clang-format", "cmake", "mkdocs", "ninja", "pyright", "ruff")


def run(*command: str | Path, **options: object) -> bool:
    return subprocess.run([str(part) for part in command], **options).returncode == 0  # type: ignore[call-overload]


def need(done: bool, otherwise: str) -> None:
    if not done:
        sys.exit(f"setup: {otherwise}")


def torch_of_this_python() -> str:
    """The version of the torch that this Python has, "" when it is not 2.11 or later. It is not imported."""
    spec = find_spec("torch")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    text = (folder / "version.py").read_text() if folder and (folder / "version.py").is_file() else ""
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
    return found[1] if found and (int(found[2]), int(found[3])) >= (2, 11) else ""


def create(folder: Path, share: bool) -> None:
    """A virtual environment with pip, also where the system's Python lacks ensurepip, as Debian's does."""
    make = [sys.executable, "-m", "venv", "--clear", *(["--system-site-packages"] if share else [])]
    if run(*make, folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        return
    need(run(*make, "--without-pip", folder), "this Python cannot make virtual environments (module venv)")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--ignore-installed", "--target", packages(folder)]
    need(run(*pip, "pip"), "this Python has no pip")


def packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder)}))


def create_with_torch(folder: Path) -> None:
    outer = torch_of_this_python()
    in_venv = sys.prefix != sys.base_prefix
    print(f"setup: {folder.name}, {f'reusing torch {outer}' if outer else f'with {TORCH}'}", flush=True)
    create(folder, share=bool(outer) and not in_venv)
    if outer and in_venv:
        # --system-site-packages would look behind that environment, at the Python it was made from.
        shared = [path for path in sys.path if path.endswith("-packages")]
        (packages(folder) / "outer.pth").write_text("\n".join(shared) + "\n")


def own_commands(python: Path, pip: list[str | Path]) -> None:
    """A shared package leaves its command in the outer environment: the commands that make calls come here once more."""
    names = [name for name in COMMANDS if not (python.parent / name).exists()]
    code = f"from importlib.metadata import version as v\nfor n in {names}: print(n + '==' + v(n))"
    exact = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    done = not exact or run(*pip, "--ignore-installed", "--no-deps", *exact)
    need(done, f"{' '.join(exact)} could not be installed")


def has(python: Path, package: str) -> bool:
    return run(python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec('{package}') is None)")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if not python.exists():
        create_with_torch(folder)
    if not has(python, "torch"):
        need(run(*pip, TORCH), f"{TORCH} could not be installed")
    nothing = {**os.environ, "MMKERNELS_BUILD": "none"}  # `make build` compiles, and only what has changed
    done = run(*pip, "-e", f"{PROJECT}[dev]", env=nothing)
    need(done, "the development dependencies could not be installed")
    own_commands(python, pip)
    if not has(python, "triton") and not run(*pip, TRITON):
        print(f"setup: no {TRITON} for this platform; its tests will say so", flush=True)


if __name__ == "__main__":
    version = sys.version.split()[0]
    need(sys.version_info >= (3, 10), f"Python 3.10 or later is needed, got {version}; make PYTHON=...")
    main()
