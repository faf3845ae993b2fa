"""The one benchmark runner: every room's BENCH table, correctness first, then ours and the peers interleaved."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.peers import peers
from mmkernels import _version
from mmkernels.primitives import _accuracy as accuracy
from mmkernels.primitives._case import Case, Inputs, Room, Unsuited
from mmkernels.primitives._op import OPS
from mmkernels.rooms import rooms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLOW = ("compiled", "flex")  # seconds of compilation each: headline rows only, unless asked for
_CPU_FLOPS = 6e10  # a larger forward pass would keep two cores busy for minutes
_EXACT_BYTES = 1.5e9  # the float64 reference is dense: beyond this its scores would not fit


@dataclass(frozen=True)
class Wanted:
    """What to run; empty means everything."""

    op: str = ""
    shape: str = ""
    dtype: str = ""
    device: str = "cpu"
    passes: str = ""
    peers: tuple[str, ...] = ()
    quick: bool = False


Row = dict[str, Any]


def run(wanted: Wanted, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """One object in the documented JSON form."""
    _know(wanted)
    machine = measure.probe(wanted.device)
    before, rows = measure.load(), []
    for room, case, dtype in _table(wanted):
        progress(f"{room.name} {case.name} {dtype}")
        rows += _rows(room, case, dtype, wanted, machine)
        gc.collect()
    return {
        "device": _device(wanted.device),
        "machine": {"gflops": {d: f / 1e9 for d, f in machine.flops.items()}, "gbytes": machine.bytes / 1e9},
        "load": {"before": before, "after": measure.load(), "loaded": before > 0.5},
        "versions": {
            "mmkernels": _version.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "git": _git(),
        "rows": rows,
    }


def _know(wanted: Wanted) -> None:
    known = {"op": set(rooms()), "dtype": set(DTYPES), "passes": {"fwd", "fwd+bwd"}}
    known["shape"] = {case.name for room in rooms().values() for case in room.bench}
    for name, allowed in known.items():
        value = getattr(wanted, name)
        if value and value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(sorted(allowed))}")
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device")


def _table(wanted: Wanted) -> Iterator[tuple[Room, Case, str]]:
    for room in rooms().values():
        for case in room.bench:
            for dtype in DTYPES:
                asked = (
                    wanted.op in ("", room.name)
                    and wanted.shape in ("", case.name)
                    and wanted.dtype in ("", dtype)
                )
                if asked and DTYPES[dtype] in case.dtypes and (case.headline or not wanted.quick):
                    yield room, case, dtype


def _rows(room: Room, case: Case, dtype: str, wanted: Wanted, machine: measure.Machine) -> list[Row]:
    torch.manual_seed(0)
    inputs = room.make(seed=1, dtype=DTYPES[dtype], device=wanted.device, **case.sizes)
    cost = room.cost(inputs)
    head = {"op": room.name, "shape": case.name, "dtype": dtype}
    if wanted.device == "cpu" and cost.flops > _CPU_FLOPS:
        return [head | {"skipped": f"{cost.flops / 1e9:.0f} GFLOP are too many for this device"}]
    excess, whose = _gate(room, case, DTYPES[dtype], wanted.device)
    found = []
    for which in case.passes:
        if wanted.passes in ("", which):
            row = head | {"pass": which, "backend": _backend(room, inputs), "correct": excess <= 1}
            if excess > 1:
                row["error"] = f"{whose} is {excess:.2f} times the allowed error"
            else:
                row |= _time(room, case, inputs, which, wanted)
                row |= _floor(cost, which, machine, dtype)
                row["share_of_floor"] = row["floor_ms"] / row["ms"]["median"]
            found.append(row)
    return found


def _gate(room: Room, case: Case, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """The accuracy rule on the row's own shape; one too large for a dense float64 reference is judged with fewer rows."""
    sizes = dict(case.sizes)
    keys = sizes.get("keys", sizes.get("images", 1) * sizes.get("latents", 64))
    while sizes.get("batch", 1) * sizes.get("rows", 1) * keys * sizes.get("heads", 1) * 8 * 4 > _EXACT_BYTES:
        sizes["rows" if sizes.get("batch", 1) == 1 else "batch"] //= 2
    inputs = room.make(seed=1, dtype=dtype, device=device, **sizes)
    ours = accuracy.leaves(inputs, room)
    found = accuracy.results(room, ours, lambda: room.call(ours))
    return accuracy.worst_excess(found, accuracy.eager(room, inputs), accuracy.exact(room, inputs))


def _backend(room: Room, inputs: Inputs) -> str:
    from mmkernels import explain

    rows = [row for row in explain(room.call, inputs) if row[0] == room.ops[0] and not row[2]]
    return rows[0][1]


def _function(run: Callable[[], Any], inputs: Inputs, room: Room, which: str) -> Callable[[], object]:
    if which == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return run()

        return forward
    leaves = [inputs[n] for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
    with torch.no_grad():
        out = run()
    weight = torch.randn_like(out if isinstance(out, Tensor) else out[0])

    def both() -> object:
        out = run()
        return torch.autograd.grad(
            out if isinstance(out, Tensor) else out[0], leaves, weight, allow_unused=True
        )

    return both


def _time(room: Room, case: Case, inputs: Inputs, which: str, wanted: Wanted) -> Row:
    fresh = accuracy.leaves(inputs, room)
    functions = {"ours": _function(lambda: room.call(fresh), fresh, room, which)}
    absent: dict[str, str] = {}
    for name, prepare in _peers(room, case, wanted).items():
        try:
            functions[name] = _function(prepare(fresh), fresh, room, which)
            functions[name]()
        except Unsuited as reason:
            absent[name] = str(reason)
        except Exception as error:  # a peer that cannot run this row is reported, and the row goes on
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            functions.pop(name, None)
    times = measure.interleave(functions, wanted.device, 0.5 if wanted.quick else 1.0)
    ratios = {name: measure.ratio(times[name], times["ours"]) for name in functions if name != "ours"}
    return {
        "ms": measure.quantiles(times["ours"]),
        "ratio": {name: found["median"] for name, found in ratios.items()},
        "ratio_p20": {name: found["p20"] for name, found in ratios.items()},
        "peer_ms": {name: measure.quantiles(times[name])["median"] for name in ratios},
        "absent": absent,
        "spread": measure.spread(times["ours"]),
        "extra_bytes": measure.extra_bytes(functions["ours"], wanted.device),
        "input_output_bytes": _held(fresh, room),
    }


def _peers(room: Room, case: Case, wanted: Wanted) -> dict[str, Callable[[Inputs], Callable[[], Tensor]]]:
    found = dict(peers(room))
    found["compiled"] = lambda inputs: torch.compile(room.peers["eager"](inputs), dynamic=False)
    if wanted.peers:
        unknown = set(wanted.peers) - set(found)
        if unknown:
            raise ValueError(
                f"peers: got {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(found))}"
            )
        return {name: found[name] for name in wanted.peers}
    return {
        name: peer
        for name, peer in found.items()
        if name not in _SLOW or (case.headline and not wanted.quick)
    }


def _held(inputs: Inputs, room: Room) -> int:
    with torch.no_grad():
        out = room.call(inputs)
    out = out if isinstance(out, Tensor) else out[0]
    return out.nbytes + sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))


def _floor(cost: Any, which: str, machine: measure.Machine, dtype: str) -> Row:
    factor = (1.0, 1.0) if which == "fwd" else (1 + cost.backward, 1 + cost.backward_bytes)
    flops, moved = cost.flops * factor[0], cost.bytes * factor[1]
    rate = machine.flops.get(dtype, machine.flops["bfloat16"])
    return {"flops": flops, "bytes": moved, "floor_ms": 1e3 * max(flops / rate, moved / machine.bytes)}


def _device(kind: str) -> dict[str, Any]:
    if kind == "cuda":
        return {"kind": kind, "name": torch.cuda.get_device_name()}
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    isa = os.environ.get("MMKERNELS_ISA") or torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu._is_amx_tile_supported()
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return {"kind": kind, "name": name, "threads": torch.get_num_threads(), "isa": isa, "amx": amx}


def _git() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return answer.stdout.strip() or "unknown"


def devices() -> list[str]:
    return sorted({device for op in OPS.values() for device in op.rows})
