"""Every room's table on every backend at hand: accuracy of outputs and gradients, opcheck, gradcheck, compile, strides.

A room adds rows to its `cases.py`; nothing is added here. Which backends run is decided by the machine: C++ where it was
built, Triton under TRITON_INTERPRET=1 in tests/rooms, CUDA kernels where a GPU is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import using
from mmkernels.primitives import _accuracy as accuracy
from mmkernels.primitives._case import Case, Inputs, Room
from mmkernels.primitives._op import OPS
from mmkernels.rooms import rooms

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
INDUCTOR = ("causal", "uneven", "plain")  # names of the rows that Inductor compiles too: one or two a room


def _present(room: Room, device: str) -> list[str]:
    """The backends that every operator of the room has on this device, the reference last."""
    rows = [{row.backend for row in OPS[op].rows[device] if not row.present()} for op in room.ops]
    return sorted(set.intersection(*rows), key=lambda b: (b == "reference", b))


def _table() -> Iterator[Any]:
    for room in rooms().values():
        for case in room.tests:
            for device in DEVICES:
                yield pytest.param(room, case, device, id=f"{room.name}-{case.name}-{device}")


TABLE = list(_table())


def _inputs(room: Room, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Inputs:
    return room.make(seed=seed, dtype=dtype, device=device, **case.sizes)


def _serves(room: Room, inputs: Inputs, backend: str) -> bool:
    """Whether the named backend takes these inputs: a refusal by name is an answer, tested in tests/rooms."""
    try:
        with using(backend):
            room.call(inputs)
    except RuntimeError as error:
        if "cannot run as asked" in str(error):
            return False
        raise
    return True


@pytest.mark.parametrize(("room", "case", "device"), TABLE)
def test_every_backend_obeys_the_accuracy_rule(room: Room, case: Case, device: str) -> None:
    for dtype in case.dtypes:
        inputs = _inputs(room, case, dtype, device)
        truth, plain = accuracy.exact(room, inputs), accuracy.eager(room, inputs)
        for backend in _present(room, device):
            if not _serves(room, inputs, backend):
                continue
            fresh = accuracy.leaves(inputs, room)
            with using(backend):
                ours = accuracy.results(room, fresh, lambda fresh=fresh: room.call(fresh))
            excess, name = accuracy.worst_excess(ours, plain, truth)
            assert excess <= 1, f"{backend} {dtype}: {name} is {excess:.2f} times the allowed error"


@pytest.mark.parametrize(("room", "case", "device"), TABLE)
def test_strides_of_inputs_and_incoming_gradients_do_not_matter(room: Room, case: Case, device: str) -> None:
    inputs = accuracy.leaves(_inputs(room, case, torch.float32, device), room)
    out = room.call(inputs)
    out = out if isinstance(out, Tensor) else out[0]
    names = [n for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
    expected = expanded = halves = ()
    if names:
        expected = torch.autograd.grad(
            out, [inputs[n] for n in names], torch.ones_like(out), retain_graph=True
        )
        expanded = torch.autograd.grad(out.sum(), [inputs[n] for n in names], retain_graph=True)  # strides 0
        halves = torch.autograd.grad(torch.cat([out, out], -1).sum() / 2, [inputs[n] for n in names])
    strided = {n: _strided(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    again = room.call(strided)
    again = again if isinstance(again, Tensor) else again[0]
    torch.testing.assert_close(
        again, out, rtol=1e-5, atol=1e-5
    )  # a library product may sum strided operands otherwise
    for name, want, a, b in zip(names, expected, expanded, halves, strict=True):
        torch.testing.assert_close(a, want, rtol=0, atol=0, msg=lambda m, name=name: f"d{name}: {m}")
        torch.testing.assert_close(b, want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"d{name}: {m}")


def _strided(x: Tensor) -> Tensor:
    """The same values, every second element of a buffer full of NaN."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] * 2), float("nan") if x.is_floating_point() else 1).to(x)
    buffer[..., ::2] = x.detach()
    return buffer[..., ::2].requires_grad_(x.requires_grad)


@pytest.mark.parametrize(("room", "case", "device"), TABLE)
def test_runs_twice_to_the_same_bits(room: Room, case: Case, device: str) -> None:
    first, second = (
        accuracy.results(room, fresh, lambda fresh=fresh: room.call(fresh))
        for fresh in (accuracy.leaves(_inputs(room, case, torch.float32, device), room) for _ in range(2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Calls(TorchDispatchMode):
    """Records the operators of ours that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mmkernels":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("room", "case", "device"), TABLE)
def test_opcheck_passes_for_every_operator_behind_the_room(room: Room, case: Case, device: str) -> None:
    inputs = accuracy.leaves(_inputs(room, case, torch.float32, device), room)
    with _Calls() as calls:
        out = room.call(inputs)
        out = out if isinstance(out, Tensor) else out[0]
        if out.requires_grad:
            names = [n for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
            torch.autograd.grad(out.sum(), [inputs[n] for n in names], allow_unused=True)
    assert calls.seen
    # tracing through AOT autograd is slow and blind to sizes: the first rows of a room are enough for it
    utils = ["test_schema", "test_faketensor"]
    if case in room.tests[:4]:
        utils += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    for func, args in calls.seen:
        learns = not func.name().endswith("_backward")
        torch.library.opcheck(func, tuple(_leaf(a, learns) for a in args), test_utils=utils)


def _leaf(x: Any, learns: bool) -> Any:
    return x.detach().requires_grad_(learns and x.requires_grad) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("room", rooms().values(), ids=rooms())
def test_gradcheck_in_float64(room: Room) -> None:
    for case in room.tests:
        inputs = accuracy.leaves(_inputs(room, case, torch.float64), room)
        names = [n for n in room.differentiable if isinstance(inputs.get(n), Tensor)]
        if not names or sum(inputs[n].numel() for n in names) > 3000:
            continue

        def function(*tensors: Tensor, inputs: Inputs = inputs, names: list[str] = names) -> Any:
            return room.call({**inputs, **dict(zip(names, tensors, strict=True))})

        assert torch.autograd.gradcheck(function, [inputs[n] for n in names], fast_mode=True), case.name


@pytest.mark.parametrize(
    "room", [r for r in rooms().values() if r.differentiable], ids=lambda room: room.name
)
def test_a_second_derivative_is_refused_by_name(room: Room) -> None:
    inputs = accuracy.leaves(_inputs(room, room.tests[0], torch.float32), room)
    out = room.call(inputs)
    first = inputs[room.differentiable[0]]
    (grad,) = torch.autograd.grad(
        (out if isinstance(out, Tensor) else out[0]).square().sum(), first, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("room", "case", "device"), TABLE)
def test_compiles_in_one_graph(room: Room, case: Case, device: str) -> None:
    backends = ["aot_eager", *(["inductor"] if case.name in INDUCTOR else [])]
    inputs = accuracy.leaves(_inputs(room, case, torch.float32, device), room)
    expected = accuracy.results(room, inputs, lambda: room.call(inputs))
    for backend in backends:
        torch._dynamo.reset()
        fresh = accuracy.leaves(inputs, room)
        compiled = torch.compile(lambda x: room.call(x), backend=backend, fullgraph=True)
        got = accuracy.results(room, fresh, lambda c=compiled, f=fresh: c(f))
        for name, want in expected.items():
            torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-5)


def _break(room: Room, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serves the room's first operator by its own reference, deliberately wrong."""
    op = OPS[room.ops[0]]
    names = [argument.name for argument in getattr(torch.ops.mmkernels, op.name).default._schema.arguments]

    def wrong(*args: Any) -> Any:
        named = dict(zip(names, args, strict=True))
        if how == "one key dropped":
            named["hi"] = torch.maximum(named["hi"] - 1, named["lo"])
        if how == "mask shifted by one":
            named["lo"], named["hi"] = named["lo"] + 1, named["hi"] + 1
        result = op.reference(*named.values())
        out, *rest = (result,) if isinstance(result, Tensor) else result
        out = out * 1.01 if how == "scale off by 1 %" else out
        return (out, *rest) if rest else out

    law = dataclasses.replace(op.rows["cpu"][-1], call=wrong)
    monkeypatch.setitem(op.rows, "cpu", [law])


@pytest.mark.parametrize("how", ["scale off by 1 %", "one key dropped", "mask shifted by one"])
@pytest.mark.parametrize("room", rooms().values(), ids=rooms())
def test_the_rule_catches_a_broken_kernel(room: Room, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(room, room.tests[0], torch.float32)
    if how != "scale off by 1 %" and "hi" not in inputs:
        pytest.skip("the room has no mask")
    truth, plain = accuracy.exact(room, inputs), accuracy.eager(room, inputs)
    _break(room, how, monkeypatch)
    fresh = accuracy.leaves(inputs, room)
    ours = accuracy.results(room, fresh, lambda: room.call(fresh))
    assert accuracy.worst_excess(ours, plain, truth)[0] > 1
