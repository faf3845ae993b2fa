"""LLaMA-VID over an hour of video: time and memory from 1 to 3,600 frames, as JSON and as a picture.

    python -m benchmarks.frames [--series connector,core,model] [--out FOLDER]

`connector`: a frame's patches to its two tokens. `core`: the same from text queries, at the published widths. `model`:
llama-vid-tiny from pictures to the next word. `eager` is the published computation, all frames at once: keys projected, a
value for every query.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import frames_plot, machine, measure
from benchmarks.measure import Function, significant
from benchmarks.wanted import Row
from mmkernels import models
from mmkernels.layers import ContextAttention, QFormerConfig

SECONDS = 1.5  # for the timing of a row, or three samples where that is longer
TOLERANCE = 1e-4
TEXT = 16  # tokens of the prompt


@dataclass(frozen=True)
class Work:
    """What a row runs: functions by name, ours first, and the bytes of what goes in."""

    functions: dict[str, Function]
    input_bytes: int


def connector(frames: int) -> Work:
    """Patches 256 wide, 64 and a class token a frame; a Q-Former of two layers with 32 queries."""
    torch.manual_seed(0)
    qformer = QFormerConfig(
        hidden=128, layers=2, heads=2, ffn=512, image_width=256, vocab=1000, text_head=False
    )
    layer = ContextAttention(256, 512, qformer=qformer).eval()
    x, ids = torch.randn(1, frames, 65, 256), torch.randint(1000, (1, 1, TEXT))
    ours: Function = lambda: layer(x, ids)  # noqa: E731
    return Work({"ours": ours, "eager": lambda: _eager(layer, x[0], ids[0])}, x.nbytes + ids.nbytes)


def core(frames: int) -> Work:
    """The published widths: 32 queries and 256 patches of 1408, tokens of 4096."""
    torch.manual_seed(0)
    small = QFormerConfig(hidden=64, layers=1, heads=1, ffn=64, image_width=1408, vocab=0)
    layer = ContextAttention(1408, 4096, qformer=small).eval()
    q, x = torch.randn(frames, 32, 1408), torch.randn(frames, 256, 1408)
    functions = {"ours": lambda: layer.attend(q, x), "eager": lambda: _eager_tokens(layer, q, x)}
    return Work(functions, q.nbytes + x.nbytes)


def model(frames: int) -> Work:
    """llama-vid-tiny: pictures through tower, connector and language model."""
    torch.manual_seed(0)
    tiny: Any = models.build("llama-vid-tiny").eval()
    pictures, prompt = torch.randn(1, 1, frames, 3, 32, 32), torch.randint(4, 512, (1, 1, TEXT))
    ids = torch.cat([torch.full((1, 2 * frames), tiny.tokens.image), prompt[0]], 1)
    ours: Function = lambda: tiny(pictures, ids, prompt_ids=prompt, last_only=True).logits  # noqa: E731
    return Work({"ours": ours}, pictures.nbytes + ids.nbytes)


SERIES: dict[str, tuple[Callable[[int], Work], tuple[int, ...]]] = {
    "connector": (connector, (1, 10, 60, 300, 1200, 3600)),
    "core": (core, (1, 4, 16, 64, 192)),
    "model": (model, (1, 10, 60, 300, 1200, 3600)),
}


def _eager(layer: ContextAttention, x: Tensor, ids: Tensor) -> Tensor:
    hidden = layer.qformer(layer.norm(x), text_ids=ids.expand(len(x), -1), mode="instruct")
    queries = layer.query(hidden[:, : layer.qformer.config.num_query])
    return _eager_tokens(layer, queries, x[:, 1:])[None, None]


def _eager_tokens(layer: ContextAttention, q: Tensor, x: Tensor) -> Tensor:
    scores = q @ layer.key(x).mT / math.sqrt(x.shape[-1])
    context = layer.value((scores.softmax(-1) @ x).mean(1, keepdim=True))
    content = layer.content_down(F.gelu(layer.content_up(x.mean(1, keepdim=True))))
    return torch.cat([context, content], 1)


@torch.no_grad()
def rows(name: str) -> Iterator[Row]:
    """A series, one row for each number of frames: nothing is timed before it is right."""
    make, counts = SERIES[name]
    for frames in counts:
        work = make(frames)
        tokens = {who: function() for who, function in work.functions.items()}
        exact = tokens.get("eager", tokens["ours"])
        worst = float((tokens["ours"] - exact).abs().max() / exact.abs().max())
        row: Row = {"op": f"frames_{name}", "shape": f"{frames} frames", "frames": frames, "dtype": "float32",
                    "pass": "fwd", "correct": worst <= TOLERANCE, "input_bytes": work.input_bytes,
                    "output_bytes": tokens["ours"].nbytes}  # fmt: skip
        yield row | (_measured(work, frames) if row["correct"] else {})


def _measured(work: Work, frames: int) -> Row:
    neighbours = machine.Neighbours()
    times = measure.interleave(work.functions, measure.cpu_clock, seconds=SECONDS, rounds=20)
    others = neighbours.cores()
    peers = [who for who in work.functions if who != "ours"]
    ours = measure.spread(times, "ours")
    return {
        "ms": ours.rounded(),
        "ms_per_frame": significant(ours.median / frames),
        "ratio": {who: significant(measure.ratio(times, who, "ours").median) for who in peers},
        "peer_ms": {who: measure.spread(times, who).rounded() for who in peers},
        "extra_bytes": measure.extra_bytes(work.functions["ours"], "cpu"),
        "peer_extra_bytes": {who: measure.extra_bytes(work.functions[who], "cpu") for who in peers},
        "others_cores": others,
        "loaded": others is not None and others > machine.BUSY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frames", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--series", default=",".join(SERIES), help="which of them (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for frames.json and frames.png")
    options = parser.parse_args()
    unknown = sorted(set(options.series.split(",")) - set(SERIES))
    if unknown:
        parser.error(f"--series: got {', '.join(unknown)}, expected some of {', '.join(SERIES)}")
    record = {**machine.describe("cpu"), "rows": []}
    for name in options.series.split(","):
        for row in rows(name):
            record["rows"].append(row)
            print(f"{row['op']:18} {row['shape']:>12}", *_say(row), flush=True)
    out = options.out or machine.ROOT / "benchmarks" / "results" / machine.slug("cpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "frames.json").write_text(json.dumps(record, indent=1) + "\n")
    print(frames_plot.draw(record, out / "frames.png"))


def _say(row: Row) -> Iterator[str]:
    if "ms" not in row:
        yield "wrong"
        return
    yield f"{row['ms']['median']:10.2f} ms {row['ms_per_frame']:8.3f} ms a frame {row['extra_bytes'] / 2**20:9.1f} MB extra"
    for who, value in row["ratio"].items():
        yield f"  {who} {value:.2f} x the time, {row['peer_extra_bytes'][who] / 2**20:.1f} MB extra"


if __name__ == "__main__":
    main()
