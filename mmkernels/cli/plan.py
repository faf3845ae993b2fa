"""`mmkernels plan`: what a training step would cost on many GPUs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mmkernels.train.plan import GPUS, Plan, Wish, plan


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="predict step time, tokens a second, memory and traffic of training",
        description="Counts a preset's step on the model itself, without its memory, and predicts from data sheets what it "
        "takes on many GPUs that share all state (FSDP2). Nothing is measured: the share of the peak is yours to say.",
        epilog="example: mmkernels plan --model flamingo-9b --gpus 64 --gpu h200 --batch 8 --images 4 --words 256",
    )
    parser.add_argument("--model", required=True, help="a preset; see mmkernels models")
    parser.add_argument("--stage", help="one of its stages (default: the last)")
    for name, text in (
        ("gpus", "how many"), ("batch", "documents a GPU"), ("images", "pictures a document"),
        ("words", "text tokens a document"),
    ):  # fmt: skip
        default = getattr(Wish, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--gpu", default=Wish.gpu, help=f"{', '.join(GPUS)} (default: %(default)s)")
    parser.add_argument(
        "--efficiency", type=float, default=Wish.efficiency, help="share of the peak (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    names = ("model", "gpus", "gpu", "batch", "images", "words", "stage", "efficiency")
    wish = Wish(**{name: getattr(options, name) for name in names})
    found = plan(wish)
    if options.json:
        print(json.dumps({**vars(options), **found._asdict()}, default=lambda value: None))
    else:
        _print(wish, found)
    return 0


def _print(wish: Wish, p: Plan) -> None:
    machine = wish.machine()
    print(f"{wish.model}, stage {p.stage}, on {wish.gpus} x {wish.gpu}, {wish.batch} documents a GPU")
    print(f"parameters   {p.parameters / 1e9:8.2f} billion, of which {p.trainable / 1e9:.2f} are trained")
    print(f"work         {p.flops / 1e12:8.1f} TFLOP a GPU and step, {p.tokens} tokens a document")
    bound = "products" if p.compute_seconds >= p.wire_seconds else "the wire"
    print(
        f"step         {1e3 * p.step_seconds:8.1f} ms, bound by {bound} at {wish.efficiency:.0%} of the peak"
    )
    print(f"             {p.tokens_per_second:8.0f} tokens a second")
    print(f"wire         {p.wire_bytes / 1e9:8.2f} GB a GPU and step: {1e3 * p.wire_seconds:.1f} ms")
    fits = "fits" if p.fits else "DOES NOT FIT"
    print(
        f"memory       {p.state_bytes / 1e9:8.1f} GB of state and {p.activation_bytes / 1e9:.1f} GB of activations a GPU: "
        f"{fits} in {machine.memory / 1e9:.0f}"
    )
