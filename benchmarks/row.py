"""One row: correctness first, then ours and its peers interleaved, then memory and the floor."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, measure, rates
from benchmarks.peers import FLOORS, peers
from benchmarks.wanted import BUILT, DTYPES, Row, Wanted, dtype_name
from mmkernels import explain, using
from mmkernels.primitives import _accuracy as accuracy
from mmkernels.primitives._case import Case, Cost, Inputs, Peer, Room, Unsuited
from mmkernels.primitives._op import BACKENDS, OPS

CPU_FLOPS = 3.5e10  # a larger forward pass would keep two cores busy for minutes
CPU_SECONDS = 0.4  # at the rate of the library's products in the row's dtype: bfloat16 runs at 1 % of float32's on some CPUs
GATE_BYTES = 3e8  # the float64 law is dense: a row whose scores are larger is judged with fewer samples


def bench(room: Room, case: Case, dtype: torch.dtype, wanted: Wanted) -> Iterator[Row]:
    """One row for each pass of one shape in one dtype; a row that is wrong has no time, one that is skipped says why."""
    head = {"op": room.name, "shape": case.name, "dtype": dtype_name(dtype), "headline": case.headline}
    inputs = room.make(seed=1, dtype=dtype, device=wanted.device, **case.sizes)
    cost = room.cost(inputs)
    passes = wanted.passes or case.passes
    why = _too_long(cost, dtype, wanted)
    if why:
        yield from ({**head, "pass": which, "skipped": why} for which in passes)
        return
    verdict = gate(room, case, dtype, wanted.device)
    for which in passes:
        row = {**head, "pass": which, "backend": backend(room, inputs, which, wanted.device), **verdict}
        row |= work(cost, which)
        if verdict["correct"]:
            row |= _timed(room, case, inputs, which, wanted)
        gc.collect()
        yield row


def _too_long(cost: Cost, dtype: torch.dtype, wanted: Wanted) -> str:
    """Why a row is not run on a CPU ("" when it is): its peers would take minutes. A shape asked for by name may be slow."""
    if wanted.device != "cpu":
        return ""
    rate = rates.of(wanted.device).product(dtype)
    if cost.flops > (CPU_FLOPS if not wanted.shapes else 3 * CPU_FLOPS):
        return f"{cost.flops / 1e9:.0f} GFLOP in a forward pass are too many for a CPU"
    if not wanted.shapes and cost.flops / rate > CPU_SECONDS:
        slow = f"{rate / 1e9:.2g} GFLOP/s in {dtype_name(dtype)}"
        return f"{cost.flops / 1e9:.2g} GFLOP at this CPU's {slow} take long; ask for it by --shape"
    return ""


def gate(room: Room, case: Case, dtype: torch.dtype, device: str) -> Row:
    """The accuracy rule on outputs and gradients: `correct`, by how much of the allowed error, and whose it is."""
    sizes, samples = dict(case.sizes), case.sizes.get("batch", 1)
    inputs = room.make(seed=2, dtype=dtype, device=device, **sizes)
    while _scores(inputs) > GATE_BYTES and sizes.get("batch", 1) > 1:
        sizes["batch"] //= 2
        inputs = room.make(seed=2, dtype=dtype, device=device, **sizes)
    fresh = accuracy.leaves(inputs, room)
    ours = accuracy.results(room, fresh, lambda: room.call(fresh))
    excess, whose = accuracy.worst_excess(ours, accuracy.eager(room, inputs), accuracy.exact(room, inputs))
    found: Row = {
        "correct": excess <= 1,
        "share_of_allowed_error": measure.significant(excess, 3),
        "worst": whose,
    }
    if sizes.get("batch", 1) != samples:
        found["judged_samples"] = sizes["batch"]
    return found


def _scores(inputs: Inputs) -> float:
    """Bytes of one dense float64 score tensor over these inputs' queries, keys and heads; 0 where nothing attends."""
    if "lo" not in inputs or "k" not in inputs:
        return 0.0
    lo, k = inputs["lo"], inputs["k"]
    heads = inputs.get("heads") or inputs["q"].shape[1]
    return 8.0 * lo.numel() * heads * (k.shape[0] if k.dim() == 3 else k.shape[2])


def backend(room: Room, inputs: Inputs, which: str, device: str) -> str:
    """Who serves the pass: one name, or `forward/backward` where they differ."""
    chosen = [row for row in explain(room.call, inputs) if row[0] == room.ops[0] and not row[2]]
    ahead = chosen[0][1] if chosen else "composed"
    if which == "fwd" or len(room.ops) < 2:
        return ahead
    back = next((row.backend for row in OPS[room.ops[1]].rows[device] if not row.present()), "reference")
    back = ahead if ahead == "reference" else back
    return ahead if which == "fwd+bwd" and ahead == back else back if which == "bwd" else f"{ahead}/{back}"


def work(cost: Cost, which: str) -> Row:
    """What the pass must compute and move."""
    flops = cost.flops * {"fwd": 1, "bwd": cost.backward, "fwd+bwd": 1 + cost.backward}[which]
    moved = cost.bytes * {"fwd": 1, "bwd": cost.backward_bytes, "fwd+bwd": 1 + cost.backward_bytes}[which]
    return {"flops": flops, "bytes": moved}


def floor(row: Row, device: str) -> Row:
    """The time that this machine's best rates would take for a row's work, and the share of our time that it is."""
    if "flops" not in row:
        return {}
    best, dtype = rates.of(device), DTYPES[row["dtype"]]
    seconds = max(row["flops"] / best.flops(dtype), row["bytes"] / best.bandwidth(row["bytes"]))
    found = {"floor_ms": measure.significant(1e3 * seconds)}
    if "ms" in row:
        found["share_of_floor"] = measure.significant(found["floor_ms"] / row["ms"]["median"])
    return found


def _function(run: Callable[[], Any], inputs: Inputs, room: Room, which: str) -> measure.Function:
    """The pass as a function without arguments that returns what it made."""
    if which == "fwd":
        return torch.no_grad()(run)

    def output() -> Tensor:
        out = run()
        return out if isinstance(out, Tensor) else out[0]

    leaves = [inputs[n] for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
    out = output()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    rules = {"grad_outputs": weight, "allow_unused": True}
    if which == "bwd":
        return lambda: torch.autograd.grad(out, leaves, retain_graph=True, **rules)

    def both() -> tuple[Any, ...]:
        out = output()
        return (out.detach(), *torch.autograd.grad(out, leaves, **rules))

    return both


def _forced(room: Room, name: str) -> Peer:
    """Ours on another backend, as a peer named after it."""

    def peer(inputs: Inputs) -> Callable[[], Any]:
        def run() -> Any:
            with using(name):
                return room.call(inputs)

        return run

    return peer


def candidates(room: Room, case: Case, wanted: Wanted) -> Mapping[str, Peer]:
    """The peers of a row: those asked for, or all that do not take long to build, and those too on headline rows."""
    found = dict(peers(room))
    found["compiled"] = lambda inputs: torch.compile(room.peers["eager"](inputs), dynamic=False)
    found |= {name: _forced(room, name) for name in BACKENDS}
    if wanted.peers:
        return {name: found[name] for name in wanted.peers if name in found}
    patient = case.headline and not wanted.quick
    return {n: peer for n, peer in found.items() if n not in BACKENDS and (patient or n not in BUILT)}


def _timed(room: Room, case: Case, inputs: Inputs, which: str, wanted: Wanted) -> Row:
    fresh = accuracy.leaves(inputs, room)
    if which == "fwd":
        fresh = {n: x.detach() if isinstance(x, Tensor) else x for n, x in fresh.items()}
    functions = {"ours": _function(lambda: room.call(fresh), fresh, room, which)}
    ours = functions["ours"]()
    absent: dict[str, str] = {}
    for name, prepare in candidates(room, case, wanted).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a peer's own
                function = _function(prepare(fresh), fresh, room, which)
                if name not in FLOORS:
                    _same(function(), ours)
            functions[name] = function
        except Unsuited as reason:
            absent[name] = str(reason)
        except Exception as error:  # whatever ails a peer is reported, and the row goes on
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    functions["again"] = functions["ours"]  # ours against itself: how close to 1 a ratio can be read
    del ours
    gc.collect()
    return _row(functions, absent, fresh, wanted)


def _same(found: Any, ours: Any) -> None:
    """A peer that computes something else is no peer. Numbers that stand alone may vanish by cancellation: not compared."""
    for a, b in zip(_tensors(found), _tensors(ours), strict=True):
        if b.numel() > 1:
            step = torch.finfo(b.dtype).eps ** 0.5 if b.is_floating_point() else 0.0
            if not float((a - b).abs().max()) <= step * float(b.abs().max()):
                raise Unsuited("it computes something else")


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for x in value if x is not None]


def _row(
    functions: dict[str, measure.Function], absent: dict[str, str], fresh: Inputs, wanted: Wanted
) -> Row:
    clock, neighbours = measure.clock(wanted.device), machine.Neighbours()
    seconds, rounds = (wanted.seconds / 4, 10) if wanted.quick else (wanted.seconds, 40)
    times = measure.interleave(functions, clock, seconds=seconds, rounds=rounds)
    others = neighbours.cores()
    rivals = [name for name in functions if name not in ("ours", "again")]
    ratios = {name: measure.ratio(times, name, "ours") for name in rivals}
    memory = {name: measure.extra_bytes(functions[name], wanted.device) for name in ("ours", *rivals)}
    made = functions["ours"]()
    row: Row = {
        "ms": measure.spread(times, "ours").rounded(),
        "ratio": {name: measure.significant(found.median) for name, found in ratios.items()},
        "ratio_p20": {name: measure.significant(found.p20) for name, found in ratios.items()},
        "ratio_p80": {name: measure.significant(found.p80) for name, found in ratios.items()},
        "peer_ms": {name: measure.spread(times, name).rounded() for name in rivals},
        "itself": measure.ratio(times, "again", "ours").rounded(),
        "extra_bytes": memory.pop("ours"),
        "peer_extra_bytes": memory,
        "input_output_bytes": sum(x.nbytes for x in (*_held(fresh), *_tensors(made))),
        "absent": absent,
        "others_cores": others,
        "loaded": others is not None and others > machine.BUSY,
    }
    if wanted.device == "cuda":
        row |= _launches(functions, rivals)
    return row


def _held(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.values() if isinstance(x, Tensor)]


def _launches(functions: dict[str, measure.Function], rivals: list[str]) -> Row:
    """CUDA: kernels alone (a replayed graph), and the wall clock of a call from Python."""
    found: Row = {"graph_ms": {}, "wall_ms": {}}
    for name in ("ours", *rivals):
        torch.cuda.synchronize()
        seconds = measure.cpu_clock(lambda f=functions[name]: (f(), torch.cuda.synchronize()), 10)
        found["wall_ms"][name] = measure.significant(1e3 * seconds)
        try:
            found["graph_ms"][name] = measure.significant(1e3 * measure.graph_seconds(functions[name]))
        except RuntimeError as error:
            found["graph_ms"][name] = None
            found.setdefault("no_graph", {})[name] = str(error).splitlines()[0][:200]
    return found
