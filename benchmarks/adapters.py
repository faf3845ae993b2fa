"""LaVIN's adapter at the published widths against its published form, convolutions of one place; as JSON.

    python -m benchmarks.adapters [--seconds 1.5] [--out FILE]

`floor_ms` is the time in which this machine copies x once: what has to be read and written at least.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.measure import Function, significant
from benchmarks.wanted import Row
from mmkernels.layers import ModalityAdapter

SHAPES = {  # sequences, tokens, channels
    "7b-512": (1, 512, 4096),
    "7b-512-batch4": (4, 512, 4096),
    "7b-decode": (1, 1, 4096),
    "clip-batch8": (8, 257, 1024),
}
TOLERANCE = 1e-5


def eager(layer: ModalityAdapter, x: Tensor) -> Tensor:
    """The published computation with the layer's parameters."""
    weights = layer.route(x)
    z = x.transpose(1, 2)
    a = F.conv1d(z, layer.down.weight.unsqueeze(-1), layer.down.bias)
    b, d = (
        F.conv1d(a, layer.up[i].unsqueeze(-1), layer.up_bias[i], groups=layer.groups)
        * weights[:, i, None, None]
        for i in range(2)
    )
    return (b + d + z).transpose(1, 2).contiguous()


def functions(name: str, backward: bool) -> tuple[dict[str, Function], dict[str, Tensor], Function]:
    """Ours and eager, what they give (outputs, or gradients of x), and the copy."""
    torch.manual_seed(0)
    b, t, c = SHAPES[name]
    layer = ModalityAdapter(c).eval()
    with torch.no_grad():
        layer.up.normal_()
        layer.up_bias.normal_()
    x, dy = torch.randn(b, t, c, requires_grad=backward), torch.randn(b, t, c)

    def run(forward: Callable[[Tensor], Tensor]) -> Tensor:
        if not backward:
            with torch.no_grad():
                return forward(x)
        inputs = (x, *layer.parameters())
        return torch.autograd.grad(forward(x), inputs, dy)[0]

    both: dict[str, Function] = {"ours": lambda: run(layer), "eager": lambda: run(lambda x: eager(layer, x))}
    given, target = x.detach(), torch.empty(b, t, c)
    return both, {who: function() for who, function in both.items()}, lambda: target.copy_(given)


def rows(seconds: float) -> Iterator[Row]:
    """A row for each shape and pass: nothing is timed before it is right."""
    for name in SHAPES:
        for backward in (False, True):
            both, found, copy = functions(name, backward)
            worst = float((found["ours"] - found["eager"]).abs().max() / found["eager"].abs().max())
            row: Row = {"op": "modality_adapter", "shape": name, "dtype": "float32", "correct": worst <= TOLERANCE,
                        "pass": "fwd+bwd" if backward else "fwd"}  # fmt: skip
            if row["correct"]:
                times = measure.interleave(
                    both | {"copy": copy}, measure.cpu_clock, seconds=seconds, rounds=20
                )
                row |= {
                    "ms": measure.spread(times, "ours").rounded(),
                    "ratio": {"eager": significant(measure.ratio(times, "eager", "ours").median)},
                    "floor_ms": significant(measure.spread(times, "copy").median),
                    "extra_bytes": measure.extra_bytes(both["ours"], "cpu"),
                    "peer_extra_bytes": {"eager": measure.extra_bytes(both["eager"], "cpu")},
                }
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="timing of a row (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the record there too")
    options = parser.parse_args()
    record = {**machine.describe("cpu"), "rows": []}
    for row in rows(options.seconds):
        record["rows"].append(row)
        print(json.dumps(row))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
