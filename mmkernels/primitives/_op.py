"""The one mechanism: an op is a schema, a law (its reference), and a short table of faster kernels.

PyTorch's dispatcher stays the dispatcher. The reference answers on every device (`CompositeExplicitAutograd`); on CPU and
CUDA the op's kernel is `Op._run`, which takes the first usable row of the device's table. `using()` names the rows to take
instead. The choice happens below autograd and below `torch.compile`, so neither sees it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mmkernels.primitives import _ranges

LIBRARY = torch.library.Library("mmkernels", "DEF")
OPS: dict[str, Op] = {}
BACKENDS = ("cuda", "triton", "cpp", "reference")  # the ladder: the fastest first
_COMPILED = {"cpp": ("cpu", "CPU"), "cuda": ("cuda", "CUDA")}  # backend -> device and suffix, dispatch key

log = logging.getLogger("mmkernels")
_LOG_LEVEL = int(os.environ.get("MMKERNELS_LOG", "0"))
_CHECK = os.environ.get("MMKERNELS_CHECK", "0") == "1"
_forced: tuple[str, ...] = ()  # global on purpose: CUDA's backward runs in autograd's own threads
_explaining: list[tuple[str, str, str]] | None = None  # while set, ops report their rows instead of computing


@dataclass(frozen=True)
class Row:
    """One kernel of an op on one device; `supports(*args)` gives "" or the reason why not."""

    backend: str
    call: Callable[..., Any]
    supports: Callable[..., str]
    present: Callable[[], str]


def _always(*_: Any) -> str:
    return ""


class Op:
    """An operator of `torch.ops.mmkernels` and the kernels that may serve it.

    `schema` has no default values (the dispatcher would drop them on the way to Python kernels). `reference` is the law in
    plain PyTorch; `fake` gives shapes (the reference itself when None); `check` looks at values and raises `ValueError`: it
    always runs on CPU, elsewhere (where it would make the host wait) only under MMKERNELS_CHECK=1.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., Any] | None = None,
        check: Callable[..., None] | None = None,
    ) -> None:
        self.name, _, self._signature = schema.partition("(")
        self.reference = reference
        self._fake = fake or reference
        self._check = check
        law = Row("reference", reference, _always, _always)
        self.rows: dict[str, list[Row]] = {"cpu": [law], "cuda": [law]}
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mmkernels::{self.name}", self._fake, lib=LIBRARY)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return getattr(torch.ops.mmkernels, self.name).default(*args)

    def register(
        self, device: str, backend: str, call: Callable[..., Any], **rules: Callable[..., str]
    ) -> None:
        """Adds a kernel for `device`; `supports(*args)` and `present()` say why it cannot serve ("" when it can)."""
        row = Row(backend, call, rules.get("supports", _always), rules.get("present", _always))
        self.rows[device].append(row)
        self.rows[device].sort(key=lambda r: BACKENDS.index(r.backend))

    def compiled(self, backend: str, *, supports: Callable[..., str] = _always) -> None:
        """Declares that a compiled module may bring this op's kernel, as the operator `<op>__cpu` or `<op>__cuda`."""
        device, key = _COMPILED[backend]
        name = f"{self.name}__{device}"
        LIBRARY.define(f"{name}({self._signature}")

        def present() -> str:
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{name}", key)
            return "" if found else f"{name} is not compiled in this installation"

        self.register(
            device, backend, getattr(torch.ops.mmkernels, name).default, supports=supports, present=present
        )

    def autograd(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        torch.library.register_autograd(f"mmkernels::{self.name}", backward, setup_context=setup, lib=LIBRARY)

    def not_twice_differentiable(self) -> None:
        """For backward ops: a second derivative is refused by name instead of being silently wrong."""

        def refuse(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"mmkernels::{self.name} is not twice differentiable; use create_graph=False")

        self.autograd(refuse, lambda ctx, inputs, output: None)

    def _ladder(self, device: str) -> list[Row]:
        rows = self.rows.get(device, self.rows["cpu"][-1:])  # other devices: the reference alone
        if not _forced:
            return [
                row for row in rows if device != "cpu" or row.backend != "triton"
            ]  # interpreted: only when asked
        return [row for name in _forced for row in rows if row.backend == name]

    def _pick(self, args: tuple[Any, ...]) -> Row:
        reasons = []
        for row in self._ladder(_device(args)):
            reason = row.present() or row.supports(*args)
            if not reason:
                return row
            reasons.append(f"{row.backend}: {reason}")
        wanted = ", ".join(_forced)
        raise RuntimeError(
            f"mmkernels::{self.name} cannot run as asked by using({wanted}): {'; '.join(reasons) or 'no such kernel'}"
        )

    def _run(self, *args: Any) -> Any:
        device = _device(args)
        if _explaining is not None:
            rows = self._ladder(device)
            _explaining.extend((self.name, row.backend, row.present() or row.supports(*args)) for row in rows)
            return self._fake(*args)
        if self._check is not None and (_CHECK or device == "cpu"):
            self._check(*args)
        row = self._pick(args)
        if _LOG_LEVEL:
            log.warning("%s: %s on %s", self.name, row.backend, device)
        if torch.is_autocast_enabled(
            device
        ):  # or a float32 product inside the body would come back in bfloat16
            with torch.autocast(device, enabled=False):
                return _ranges.call(self.name, row.backend, row.call, args)
        return _ranges.call(self.name, row.backend, row.call, args)


def _device(args: tuple[Any, ...]) -> str:
    return next(a.device.type for a in args if isinstance(a, torch.Tensor))


@contextlib.contextmanager
def using(*backends: str) -> Iterator[None]:
    """Serves every op, in every thread, by the first of the named backends that can; an op that none can serve raises.

    Names: "cuda", "triton", "cpp", "reference". For tests, benchmarks and bisecting, not for production switching.

    >>> with mmkernels.using("reference"):
    ...     y = model(x)
    """
    global _forced
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown or not backends:
        raise ValueError(f"backends: got {unknown or 'none'}, expected some of {', '.join(BACKENDS)}")
    before, _forced = _forced, backends
    try:
        yield
    finally:
        _forced = before


def backends(device: str = "cpu") -> dict[str, dict[str, str]]:
    """For every op: backend -> "" when it is usable on `device`, else the reason why not."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device: got {device!r}, expected "cpu" or "cuda"')
    return {name: {row.backend: row.present() for row in op.rows[device]} for name, op in sorted(OPS.items())}


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, str, str]]:
    """Which implementation would serve each operator behind `op(*args, **kwargs)`, and why not a faster one.

    `op` is a public function or a module of ours. Nothing is computed. Returns rows (operator, backend, reason), fastest
    backend first; the first row of an operator whose reason is "" is the one that would run.

    >>> mmkernels.explain(mmkernels.interval_attention, q, k, v, lo, hi)
    [('interval_attention', 'cpp', ''), ('interval_attention', 'reference', '')]
    """
    global _explaining
    rows: list[tuple[str, str, str]] = []
    before, _explaining = _explaining, rows
    try:
        op(*args, **kwargs)
    finally:
        _explaining = before
    return rows
