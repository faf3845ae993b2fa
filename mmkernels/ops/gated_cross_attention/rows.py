"""Which kernels serve the gated blocks: library products around each backend's interval attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mmkernels.ops.gated_cross_attention import composed, feed_forward, op
from mmkernels.primitives._op import Row
from mmkernels.primitives.interval_attention.op import BACKWARD, FORWARD


def _attend(device: str, row: Row, back: Row) -> None:
    core = composed.Core(row.call, back.call)

    def present() -> str:
        return row.present() or back.present()

    rules = {"present": present, "supports": op.kernel_dtypes}
    op.FORWARD.register(device, row.backend, partial(composed.forward, core), **rules)
    rules = {"present": present, "supports": _second(op.kernel_dtypes)}
    op.BACKWARD.register(device, row.backend, partial(composed.backward, core), **rules)
    rules = {"present": present, "supports": feed_forward.kernel_dtypes}
    feed_forward.FORWARD.register(device, row.backend, composed.feed_forward, **rules)
    rules = {"present": present, "supports": _second(feed_forward.kernel_dtypes)}
    feed_forward.BACKWARD.register(device, row.backend, composed.feed_forward_backward, **rules)


def _second(supports: Callable[..., str]) -> Callable[..., str]:
    """The same rule for a backward operator, whose first argument is the incoming gradient."""
    return lambda dy, *rest: supports(*rest)


def register(device: str, rows: list[Row], backs: dict[str, Row]) -> Any:
    for row in rows:
        if row.backend != "reference" and row.backend in backs:
            _attend(device, row, backs[row.backend])


for _device in FORWARD.rows:
    register(_device, FORWARD.rows[_device], {back.backend: back for back in BACKWARD.rows[_device]})
