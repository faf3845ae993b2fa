"""The picture of `benchmarks.frames`: time and memory over the number of frames, series by series."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.plots import COLOURS, FAINT, GREY, STYLE, save
from benchmarks.report import Record
from benchmarks.wanted import Row

TITLES = {
    "frames_connector": "connector: 64 patches a frame, 256 wide, to two tokens",
    "frames_core": "its core at the published widths: 256 patches of 1408",
    "frames_model": "llama-vid-tiny: pictures to the next word",
}
OURS = "#1f5fbf"


def draw(record: Record, file: Path) -> Path:
    """One row of panels a series: seconds on the left, megabytes on the right, both axes logarithmic."""
    names = [name for name in TITLES if any(row["op"] == name for row in record["rows"])]
    with matplotlib.rc_context({**STYLE, "axes.spines.left": True}):
        figure = Figure(figsize=(9.2, 0.9 + 3.1 * len(names)))
        axes = figure.subplots(len(names), 2, squeeze=False)
        for name, (time, memory) in zip(names, axes, strict=True):
            rows = [row for row in record["rows"] if row["op"] == name and "ms" in row]
            _time(time, rows)
            _memory(memory, rows)
            time.set_title(TITLES[name], loc="left", fontsize=9.5, fontweight="bold")
        head = 1 - 0.75 / figure.get_size_inches()[1]
        figure.tight_layout(rect=(0, 0, 1, head), h_pad=1.5)
        figure.text(0.015, 1 - 0.3 * (1 - head), "Two tokens a frame, up to an hour at one frame a second", fontsize=13,
                    fontweight="bold")  # fmt: skip
        about = f"{record['device']}  ·  torch {record['versions']['torch']}  ·  {record['git']}  ·  float32, forward"
        figure.text(0.015, 1 - 0.75 * (1 - head), about, fontsize=8, color=GREY)
        return save(figure, file)


def _time(axis: Axes, rows: list[Row]) -> None:
    frames = [row["frames"] for row in rows]
    axis.plot(frames, [row["ms"]["median"] / 1e3 for row in rows], "o-", color=OURS, ms=4, label="ours")
    for who in rows[-1]["peer_ms"]:
        times = [row["peer_ms"][who]["median"] / 1e3 for row in rows]
        axis.plot(frames, times, "s-", color=COLOURS[who], ms=3.5, label=who)
    last = rows[-1]["ms_per_frame"] / 1e3
    axis.plot(frames, [last * n for n in frames], ":", color=GREY, lw=1, label="in proportion to frames")
    _axes(axis, "s")


def _memory(axis: Axes, rows: list[Row]) -> None:
    frames = [row["frames"] for row in rows]

    def line(values: list[float], style: str, colour: str, label: str) -> None:
        axis.plot(
            frames, [max(value, 1) / 2**20 for value in values], style, color=colour, ms=3.5, label=label
        )

    line([row["extra_bytes"] for row in rows], "o-", OURS, "ours, beyond what goes in and out")
    for who in rows[-1]["peer_ms"]:
        line([row["peer_extra_bytes"][who] for row in rows], "s-", COLOURS[who], f"{who}, the same")
    line([row["input_bytes"] for row in rows], ":", GREY, "what goes in")
    _axes(axis, "MB")


def _axes(axis: Axes, unit: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("frames")
    axis.set_ylabel(unit)
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(plain)
    axis.grid(color=FAINT, linewidth=0.8)
    axis.legend(frameon=False, fontsize=7.5)
