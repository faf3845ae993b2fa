"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

from mmkernels.data import store
from mmkernels.train.expert_map import draw_experts
from mmkernels.train.log import read

NAME = "loss.png"


def draw(out: Path) -> Path:
    """Draws each loss of `log.jsonl` over the steps, with the stages' borders; which experts were used last, beside it.

    **Raises** ImportError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the loss curve needs matplotlib: pip install "mmkernels[train]"') from error
    records = read(out)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for name in sorted({name for record in records for name in record["losses"]}):
        points = [(record["step"], record["losses"][name]) for record in records if name in record["losses"]]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    stages = [record["stage"] for record in records]
    for step, (before, after) in enumerate(pairwise(stages), start=1):
        if before != after:
            axes.axvline(step, color="grey", linestyle=":")
            axes.annotate(f" {after}", (step, 1), xycoords=("data", "axes fraction"), va="top", color="grey")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    store.write(out / NAME, png.getvalue())
    used = [r["held_out"]["experts"] for r in records if "experts" in r.get("held_out", {})]
    if used:
        draw_experts(used[-1], out)
    return out / NAME
