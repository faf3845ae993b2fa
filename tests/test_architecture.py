"""The house rules that a tool can hold: budgets, names, imports, environment variables, no pickles.

Import floors are import-linter's (pyproject.toml). Every rule here is also shown a text that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels.primitives._op import LIBRARY, OPS

ROOT = Path(__file__).parents[1]
LINES = {".py": 300, ".cu": 400, ".cuh": 400, ".h": 400, ".cpp": 250}
LINES_OF = {"setup.py": 70, "CMakeLists.txt": 110}
FUNCTION, KERNEL = 50, 80
POSITIONAL, KEYWORD_ONLY = 9, 8
VARIABLES = {f"MMKERNELS_{name}" for name in ("BUILD", "TORCH", "CHECK", "LOG", "NVTX", "ISA")}
SECTIONS = ("Shapes", "Dtypes", "Gradient", "Edge", "Raises", "Source", "Speed")
FOLDERS = ("mmkernels", "csrc", "benchmarks", "tests", "tools", "docs")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _files(*suffixes: str, under: tuple[str, ...] = FOLDERS) -> list[Path]:
    found = (path for folder in under for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(path for path in found if path.is_file())


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


PYTHON = [ROOT / "setup.py", *_files(".py")]
PACKAGE = _files(".py", under=("mmkernels",))
NATIVE = _files(".cu", ".cuh", ".h", ".cpp")


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def is_kernel(function: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def length(function: Function) -> int:
    """Lines of code: the docstring, whose form is prescribed, is not counted, nor are decorators."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    first = function.body[0]
    return lines - ((first.end_lineno or 0) - first.lineno + 1)


def too_long(source: str) -> list[str]:
    return [
        f"{f.name}: {length(f)} lines"
        for f in functions(ast.parse(source))
        if length(f) > (KERNEL if is_kernel(f) else FUNCTION)
    ]


def mirrors_a_schema(names: list[str], schemas: list[list[str]]) -> bool:
    """Whether the parameters are an operator's arguments, all or some, in its order."""

    def within(schema: Iterator[str]) -> bool:
        return all(name in schema for name in names)  # `in` consumes the iterator: order is checked

    return any(within(iter(schema)) for schema in schemas)


def too_many_parameters(source: str, schemas: list[list[str]]) -> list[str]:
    """Kernels, mirrors of a schema and constructors are free."""
    found = []
    for function in functions(ast.parse(source)):
        arguments = function.args
        names = [
            a.arg for a in (*arguments.posonlyargs, *arguments.args) if a.arg not in ("self", "cls", "ctx")
        ]
        if is_kernel(function) or function.name == "__init__" or mirrors_a_schema(names, schemas):
            continue
        if len(names) > POSITIONAL or len(arguments.kwonlyargs) > KEYWORD_ONLY:
            found.append(
                f"{function.name}: {len(names)} positional, {len(arguments.kwonlyargs)} keyword-only"
            )
    return found


def _schemas() -> list[list[str]]:
    names = {*OPS, *(name.split("::")[1] for name in LIBRARY._op_defs)}
    operators = (getattr(torch.ops.mmkernels, name).default for name in names)
    return [[argument.name for argument in operator._schema.arguments] for operator in operators]


def own_variables(source: str) -> set[str]:
    """Names of ours that are read from the environment."""
    return set(re.findall(r"""(?:environ\b[^\n]{0,8}|getenv)[\[(]\s*["'](MMKERNELS_\w+)""", source))


def pickles(source: str) -> list[str]:
    """Ways to run code hidden in a file: pickle and its relatives, torch.save, torch.load that is not weights_only."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [
            m
            for m in modules
            if m.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
        ]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe_load = call == "torch.load" and keywords.get("weights_only") != "True"
        if call in ("torch.save", "eval", "exec") or unsafe_load or keywords.get("allow_pickle") == "True":
            found.append(ast.unparse(node))
    return found


def imported(source: str, module: str = "") -> set[str]:
    """Absolute names of the modules that `module` (its own dotted name) imports, TYPE_CHECKING or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def room_of(module: str) -> str:
    """ "mmkernels.ops.moe.triton" -> "mmkernels.ops.moe"; "" when the module is in no room."""
    match = re.match(r"mmkernels\.(primitives|ops)\.([a-z]\w*)", module)
    return match[0] if match else ""


def strangers(source: str, module: str) -> set[str]:
    """Rooms of the same floor that a module of a room imports."""
    room = room_of(module)
    if not room:
        return set()
    others = {room_of(name) for name in imported(source, module)} - {room, ""}
    return {other for other in others if other.rsplit(".", 1)[0] == room.rsplit(".", 1)[0]}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE, ROOT / "CMakeLists.txt"], ids=_name)
def test_files_stay_within_their_budget(path: Path) -> None:
    budget = LINES_OF.get(path.name, LINES.get(path.suffix, 0))
    assert len(path.read_text().splitlines()) <= budget


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_functions_stay_within_their_budget(path: Path) -> None:
    assert not too_long(path.read_text())


def test_functions_take_few_parameters() -> None:
    schemas = _schemas()
    found = {_name(path): too_many_parameters(path.read_text(), schemas) for path in PYTHON}
    assert not {path: names for path, names in found.items() if names}


def test_six_environment_variables_and_no_more() -> None:
    sources = (path for path in (*PYTHON, *NATIVE) if "tests" not in path.parts)
    read = set().union(*(own_variables(path.read_text()) for path in sources))
    assert {"MMKERNELS_BUILD", "MMKERNELS_TORCH", "MMKERNELS_ISA"} <= read <= VARIABLES


@pytest.mark.parametrize("path", [*PACKAGE, *_files(".py", under=("benchmarks",))], ids=_name)
def test_nothing_pickles(path: Path) -> None:
    assert not pickles(path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_rooms_do_not_know_each_other_and_nobody_knows_integrations(path: Path) -> None:
    source, module = path.read_text(), _module(path)
    assert not strangers(source, module)
    names = imported(source, module)
    assert module.startswith("mmkernels.integrations") or not any(
        "mmkernels.integrations" in n for n in names
    )
    assert not any(re.match(r"(tests|tools)\b", name) for name in names)


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_triton_is_imported_by_kernels_alone(path: Path) -> None:
    """Without Triton everything else still imports: the kernels register themselves where it is there."""
    kernels = path.name in ("triton.py", "_tiles.py") or path.parent.name == "triton"
    assert kernels or not any(name.split(".")[0] == "triton" for name in imported(path.read_text()))


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name == "reference.py"], ids=_name)
def test_the_law_needs_only_torch(path: Path) -> None:
    allowed = r"(__future__|collections|math|typing|torch|mmkernels\.primitives\.\w+(\.reference)?$)"
    assert all(re.match(allowed, name) for name in imported(path.read_text(), _module(path)))


@pytest.mark.parametrize(
    "path", [p for p in NATIVE if p.suffix == ".cu" or p.match("cpu_kernels*")], ids=_name
)
def test_kernels_include_no_torch_and_no_other_room(path: Path) -> None:
    """So nvcc alone compiles a .cu, and no inline function of torch is compiled for a higher instruction set."""
    allowed = rf'(<(?!torch|ATen|c10|pybind11)|"(\.\./common/(?!isa\.h)|\.\./{path.parent.name}/)?[\w.]+")'
    includes = re.findall(r"^\s*#include\s+(\S+)", path.read_text(), re.MULTILINE)
    assert includes
    assert all(re.match(allowed, name) for name in includes)


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=_name)
def test_files_are_named_after_what_they_are(path: Path) -> None:
    assert not re.search(r"_(v\d+|fast|new|old|final)$", path.stem)


def _public_ops() -> list[Callable[..., object]]:
    exported = (getattr(mmkernels, name) for name in dir(mmkernels))
    return [x for x in exported if room_of(getattr(x, "__module__", "")) and not isinstance(x, type)]


@pytest.mark.parametrize("function", _public_ops(), ids=lambda f: f.__name__)
def test_public_functions_say_what_a_user_asks(function: Callable[..., object]) -> None:
    doc = function.__doc__ or ""
    missing = [section for section in SECTIONS if f"**{section}**" not in doc]
    assert not missing


def test_every_rule_catches_what_it_forbids() -> None:
    body = "\n".join(["    x = 1"] * FUNCTION)
    assert too_long(f"def f():\n{body}") == [f"f: {FUNCTION + 1} lines"]
    assert not too_long(f'def f():\n    """{body}"""')
    assert not too_long(f"@triton.jit\ndef f():\n{body}")
    letters = [f"p{i}" for i in range(10)]
    many = f"def f({', '.join(letters)}): ..."
    assert too_many_parameters(many, []) == ["f: 10 positional, 0 keyword-only"]
    assert too_many_parameters(many, [letters[::-1]])
    assert not too_many_parameters(many, [["q", *letters, "scale"]])
    assert too_many_parameters(f"def f(*, {', '.join(letters)}): ...", []) == [
        "f: 0 positional, 10 keyword-only"
    ]
    assert own_variables(
        'os.environ.get("MMKERNELS_FAST")\nos.environ["MMKERNELS_A"]; getenv("MMKERNELS_B")'
    ) == {"MMKERNELS_FAST", "MMKERNELS_A", "MMKERNELS_B"}
    assert len(pickles("import pickle\ntorch.save(x, f)\ntorch.load(f)\nnp.load(f, allow_pickle=True)")) == 4
    assert not pickles("torch.load(f, weights_only=True)")
    inner = "from mmkernels.ops import resampler\nfrom mmkernels.primitives import _check, routing"
    assert strangers(inner, "mmkernels.ops.moe.op") == {"mmkernels.ops.resampler"}
    assert strangers("from ..resampler import op", "mmkernels.ops.moe.op") == {"mmkernels.ops.resampler"}
