"""Compiles every GPU kernel ahead of time for sm_80, sm_90a and sm_100, without a GPU, and refuses spills.

The Triton kernels are compiled with the arguments their own launchers pass: the launchers run on small CPU tensors with every
kernel replaced by a recorder, so no second list of signatures can grow stale. Registers, spills and shared memory come from the
machine code (cuobjdump), not from the compiler's own word.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.compile_passes import SHAPES, passes_of

ROOT = Path(__file__).parents[1]
TARGETS = {
    "sm_80": (80, 163),
    "sm_90a": (90, 227),
    "sm_100": (100, 227),
}  # architecture, KiB of shared memory a block
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip
WGMMA = (
    "forward",
    "backward_q",
    "backward_kv",
    "product",
    "weight_backward",
)  # must use Hopper's products where the tile allows (bf16, 64 rows or more)


class Kernel(NamedTuple):
    name: str
    target: str
    dtype: str
    width: int
    rules: str


class Found(NamedTuple):
    kernel: Kernel
    registers: int
    spills: int
    shared: int
    wgmma: int

    def problem(self) -> str:
        if self.spills:
            return f"spills {self.spills} bytes"
        limit = TARGETS[self.kernel.target][1] * 1024
        return f"{self.shared} bytes of shared memory, {limit} are there" if self.shared > limit else ""


class _Recorder:
    """Stands in for a kernel: remembers what a launcher passes instead of launching."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: self.calls.append((self.kernel, args, named))


def launches(dtype: torch.dtype, width: int, rules: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Every kernel call of one forward and one backward pass, over shapes that take every tile of the tables."""
    from triton.runtime.jit import JITFunction

    modules, passes = passes_of(dtype, width, rules)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    kept = [(m, n, f) for m in modules for n, f in vars(m).items() if isinstance(f, JITFunction)]
    try:
        for module, name, kernel in kept:
            setattr(module, name, _Recorder(kernel, calls))
        for one in passes:
            one()
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)
    return calls


def _source(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What triton.compile takes: signature, constants, 16-byte alignment of pointers and of the strides that have it."""
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        n: v for n, v in named.items() if n in kernel.arg_names
    }
    options = {n: v for n, v in named.items() if n not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[at].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(at,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "u32" if value < 2**32 else "i64"


def compile_shape(job: tuple[torch.dtype, int, str, str]) -> list[Found]:
    """All distinct kernels of one dtype, width, rule set and target."""
    import triton
    from triton.backends.compiler import GPUTarget

    dtype, width, rules, target = job
    found, seen = [], set()
    for kernel, args, named in launches(dtype, width, rules):
        source, options = _source(kernel, args, named)
        key = (kernel.fn.__name__, str(source.signature), str(source.constants), str(options))
        if key in seen:
            continue
        seen.add(key)
        built = triton.compile(source, target=GPUTarget("cuda", TARGETS[target][0], 32), options=options)
        registers, spills = _usage(built.asm["cubin"])
        about = Kernel(kernel.fn.__name__, target, str(dtype).removeprefix("torch."), width, rules)
        found.append(
            Found(about, registers, spills, built.metadata.shared, built.asm["ptx"].count("wgmma.mma_async"))
        )
    return found


def _cuobjdump() -> str:
    import triton

    inside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside.is_file() else shutil.which("cuobjdump") or "cuobjdump"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes spilled, the most of any kernel in the file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(max(map(int, re.findall(rf"\b{name}:(\d+)", text))) for name in ("REG", "LOCAL"))  # type: ignore[return-value]


def cuda_sources() -> Iterator[Found]:
    """Every csrc/*/cuda.cu through nvcc alone: they include no torch header."""
    if shutil.which("nvcc") is None:
        print("nvcc was not found: csrc/*/cuda.cu are not compiled", file=sys.stderr)
        return
    for source in sorted(ROOT.glob("csrc/*/cuda.cu")):
        for target in TARGETS:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                command = [
                    "nvcc",
                    "-std=c++17",
                    "-O3",
                    "-cubin",
                    f"-arch={target}",
                    "-o",
                    file.name,
                    str(source),
                ]
                subprocess.run(command, check=True)
                registers, spills = _usage(Path(file.name).read_bytes())
            yield Found(Kernel(source.parent.name + "/cuda.cu", target, "", 0, ""), registers, spills, 0, 0)


def missing_wgmma(rows: list[Found]) -> list[str]:
    """Kernels that never use Hopper's products in bfloat16 though they should."""
    hopper = [
        r
        for r in rows
        if r.kernel.target == "sm_90a" and r.kernel.dtype == "bfloat16" and r.kernel.width in (64, 1024)
    ]
    return [name for name in WGMMA if not any(r.wgmma for r in hopper if r.kernel.name == name)]


def write(rows: list[Found], file: Path) -> None:
    import triton

    lines = [
        "# Compile table",
        "",
        f"Written by `make compile-table` with Triton {triton.__version__}: no GPU, no measurement. Registers a thread, bytes",
        "spilled, bytes of shared memory a block, and `wgmma` instructions in the PTX.",
        "",
        "| kernel | target | dtype | width | rules | registers | spilled | shared | wgmma |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {' | '.join(map(str, (*r.kernel, r.registers, r.spills, r.shared, r.wgmma)))} |" for r in rows
    ]
    file.write_text("\n".join(lines) + "\n")


def main() -> int:
    jobs = [(*shape, target) for shape in SHAPES for target in TARGETS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = sorted(r for some in pool.map(compile_shape, jobs) for r in some)
    rows += cuda_sources()
    table = Table("kernel", "target", "dtype", "width", "rules", "registers", "spilled", "shared", "wgmma")
    for r in rows:
        table.add_row(*map(str, (*r.kernel, r.registers, r.spills, r.shared, r.wgmma)))
    Console(width=140).print(table)
    problems = [f"{' '.join(map(str, r.kernel))}: {r.problem()}" for r in rows if r.problem()]
    problems += [f"{name}: no wgmma on sm_90a" for name in missing_wgmma(rows)]
    if "--write" in sys.argv:
        write(rows, ROOT / "docs" / "compile-table.md")
    print("\n".join(problems) or f"{len(rows)} kernels compiled, nothing spills")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
