"""What an installation promises: it imports with nothing compiled, starts nothing at import, and builds what it is told to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels import _native

ROOT = Path(__file__).parents[1]
MODULES = {"_C_cpu", "_C_cuda", "_host"}
BUILT = list((ROOT / "mmkernels").glob("_*.so"))


def _run(code: str, folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *flags, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def _build(out: Path, *, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into `out`, never into the repository."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(out),
        "--build-temp",
        str(out / "temp"),
    ]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which nothing was ever compiled."""
    folder = tmp_path_factory.mktemp("pure")
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "mmkernels", folder / "mmkernels", ignore=ignore)
    return folder


# An editable installation's finder would lend the copy the repository's own compiled modules.
ATTEND = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, mmkernels
assert mmkernels.__file__.startswith({folder!r}), mmkernels.__file__
assert not torch.cuda.is_initialized()
q = torch.arange(24.0).view(4, 2, 3).sin()
lo = torch.tensor([0, 0, 1, 4], dtype=torch.int32)
out = mmkernels.interval_attention(q, q, q, lo, torch.full_like(lo, 4))
assert out[3].eq(0).all()
"""


def test_with_nothing_compiled_every_operator_runs_its_reference(pure: Path) -> None:
    check = """
from mmkernels import _native
assert all(_native.reasons.values()), _native.reasons
for rows in mmkernels.backends("cpu").values():
    assert rows["reference"] == "" and "not compiled" in rows.get("cpp", "not compiled"), rows
"""
    result = _run(ATTEND.format(folder=str(pure)) + check, pure)
    assert result.returncode == 0, result.stderr


def test_without_triton_everything_else_works(pure: Path) -> None:
    blocked = "import sys\nsys.modules['triton'] = None\n"
    check = """
assert "triton" not in mmkernels.backends("cuda")["interval_attention"] or mmkernels.backends("cuda")[
    "interval_attention"]["triton"]
"""
    result = _run(blocked + ATTEND.format(folder=str(pure)) + check, pure)
    assert result.returncode == 0, result.stderr


def test_import_starts_nothing_and_prints_nothing() -> None:
    """No CUDA context (a forked data loader would inherit it), no Triton compiler, no threads, no plotting library."""
    code = """
import sys, threading, torch, mmkernels
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1
heavy = {"matplotlib", "transformers", "skimage", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    result = _run(code, ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_there_or_says_why_not(name: str) -> None:
    there = any(path.name.startswith(f"{name}.") for path in BUILT)
    reason = _native.reasons[name]
    assert there or reason
    assert reason != "" or there
    recorded = _native.build_info()["modules"]
    assert set(recorded) == MODULES
    assert (recorded[name] == "") == there


def test_a_module_that_does_not_load_is_a_reason_not_an_error(pure: Path, tmp_path: Path) -> None:
    shutil.copytree(pure / "mmkernels", tmp_path / "mmkernels")
    (tmp_path / "mmkernels" / "_C_cpu.abi3.so").write_text("not a shared object")
    code = ATTEND.format(folder=str(tmp_path)) + "print(mmkernels._native.reasons['_C_cpu'])"
    result = _run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.match(r"_C_cpu\.abi3\.so does not load in torch 2\..*", result.stdout)


def test_build_none_compiles_nothing_and_says_so(tmp_path: Path) -> None:
    result = _build(tmp_path, MMKERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert "nothing is compiled" in result.stderr
    info = json.loads((tmp_path / "mmkernels" / "_build_info.json").read_text())
    assert info == {"modules": dict.fromkeys(("_C_cpu", "_C_cuda", "_host"), "MMKERNELS_BUILD=none")}
    assert not list(tmp_path.rglob("*.so"))


def test_build_cuda_without_nvcc_fails_loudly(tmp_path: Path) -> None:
    result = _build(tmp_path, MMKERNELS_BUILD="cuda", CUDACXX=str(tmp_path / "nvcc"))
    assert result.returncode != 0
    assert "MMKERNELS_BUILD=cuda: no working nvcc was found" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_an_unknown_build_is_refused(tmp_path: Path) -> None:
    result = _build(tmp_path, MMKERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "got 'gpu', expected auto, cpu, cuda or none" in result.stderr


@pytest.mark.parametrize(
    ("version", "reason"), [("2.10.1", "is not torch 2.11 or later"), ("", "is not torch")]
)
def test_torch_that_is_too_old_or_absent(tmp_path: Path, version: str, reason: str) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    if version:
        (torch / "version.py").write_text(f"__version__ = '{version}'\n")
    named = {"MMKERNELS_TORCH": str(torch)}
    told = _build(tmp_path, MMKERNELS_BUILD="cpu", **named)
    assert told.returncode != 0
    assert f"MMKERNELS_BUILD=cpu: {torch} {reason}" in told.stderr
    free = _build(tmp_path, MMKERNELS_BUILD="auto", **named)
    assert free.returncode == 0
    assert reason in free.stderr


NEEDS_CPU = pytest.mark.skipif(bool(_native.reasons["_C_cpu"]), reason=_native.reasons["_C_cpu"])


@NEEDS_CPU
@pytest.mark.parametrize("isa", str(_native.build_info().get("cpu_isas", "")).split(";"))
def test_every_instruction_set_gives_the_answer_of_the_law(isa: str) -> None:
    if _native.host is None or isa not in _native.host.runnable_isas():
        pytest.skip(f"this CPU cannot run {isa}, or _host is not there to tell")
    code = """
import torch, mmkernels
torch.manual_seed(0)
q, k, v = torch.randn(3, 70, 2, 64).unbind()
lo = torch.arange(70, dtype=torch.int32) // 9
hi = lo + 40 - lo % 7
answers = []
for backend in ("cpp", "reference"):
    with mmkernels.using(backend):
        answers.append(mmkernels.interval_attention(q, k, v, lo, hi.clamp(max=70)))
torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
"""
    result = _run(code, ROOT, MMKERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr


@NEEDS_CPU
def test_an_instruction_set_that_this_cpu_lacks_is_refused() -> None:
    code = """
import torch, mmkernels
x, lo = torch.ones(4, 1, 64), torch.zeros(4, dtype=torch.int32)
mmkernels.interval_attention(x, x, x, lo, lo)
"""
    result = _run(code, ROOT, MMKERNELS_ISA="avx1024")
    assert result.returncode != 0
    assert 'MMKERNELS_ISA: got "avx1024", expected scalar, avx2 or avx512' in result.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("path", [p for p in BUILT if p.name.startswith("_C_")], ids=lambda p: p.name)
def test_compiled_modules_fit_any_python_any_torch_and_any_cuda(path: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert not [name for name in needed if re.match(r"lib(python|cudart|torch_python|c10)", name)]
    symbols = subprocess.run(
        ["readelf", "-sW", "--dyn-syms", str(path)], check=True, capture_output=True, text=True
    )
    assert not re.search(r"UND (_?Py[A-Z_]|_ZN2at|_ZN3c10)", symbols.stdout), (
        "a symbol outside the stable ABI"
    )


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_inline_function_of_a_higher_instruction_set_can_replace_a_baseline_one() -> None:
    """The linker keeps one copy of a weak symbol: were it the AVX-512 one, the baseline would crash on older CPUs."""
    objects = list((ROOT / "build").glob("temp.*/CMakeFiles/kernels_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("no object files of a development build")
    for path in objects:
        isa = re.search(r"kernels_(\w+)\.dir", str(path))[1]  # type: ignore[index]
        listing = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        weak = re.findall(r"^\S+ [WVu] (.*)$", listing, re.MULTILINE)
        assert not [name for name in weak if f"mmkernels::{isa}::" not in name], path.name


def test_metadata_neither_fetches_nor_pins_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]", text, re.MULTILINE)[1]  # type: ignore[index]
    assert "torch" not in requires
    dependencies = re.search(r"^dependencies = \[(.*)\]", text, re.MULTILINE)[1]  # type: ignore[index]
    assert '"torch>=2.11"' in dependencies
    assert "==" not in dependencies
