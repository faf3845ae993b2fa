"""Pictures of a record: every ratio with losses on their own side of 1, and how near the floor each row comes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from benchmarks.report import Record, best_peer, peers_of, timed, times
from benchmarks.wanted import Row

matplotlib.use("Agg")

INK, GREY, FAINT, LOSS = "#1f2328", "#59636e", "#e3e6ea", "#d1242f"
BAR, LEFT, TOP, BOTTOM = 0.17, 1.9, 1.25, 0.35  # inches: how tall a bar is, and the margins
COLOURS = {
    "eager": "#8c959f", "compiled": "#5e6ad2", "sdpa": "#2f81f7", "flex": "#39b5b2", "padded": "#d4a72c",
    "segments": "#e8762d", "composed": "#3fa34d", "varlen": "#a475f9", "reference": "#57606a",
}  # fmt: skip
OTHERS = ("#bf4b8a", "#7d5b3a", "#4d6b8a", "#a2a832")
HUES = ("#1f5fbf", "#8ab4f8", "#b35a00", "#f5b26b", "#2b7a3d", "#9fd6a8")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.edgecolor": "#c4c9d0", "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "ytick.major.size": 0, "axes.axisbelow": True, "hatch.linewidth": 0.6,
}  # fmt: skip

Shape = tuple[str, str]  # op and name


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes headline.png, ratio-<op>-<dtype>.png and floor.png; returns their paths."""
    rows, written = timed(record), []
    loaded = "  ·  LOADED MACHINE" if record["load"]["loaded"] else ""
    subtitle = f"{record['device']}  ·  torch {record['versions']['torch']}  ·  {record['git']}{loaded}"
    with matplotlib.rc_context(STYLE):
        for name, title, chosen in _pictures(rows):
            written.append(save(_ratios(chosen, title, subtitle), folder / f"{name}.png"))
        floored = [row for row in rows if "share_of_floor" in row]
        if floored:
            written.append(save(_floors(floored, subtitle), folder / "floor.png"))
    return written


def _pictures(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    rows = [row for row in rows if row["ratio"]]
    headline = [row for row in rows if row["headline"] and row["dtype"] == "float32"]
    if headline:
        yield "headline", "Headline rows, float32", headline
    for op in dict.fromkeys(row["op"] for row in rows):
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["op"] == op):
            chosen = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            yield f"ratio-{op}-{dtype}", f"{op}, {dtype}", chosen


def save(figure: Figure, file: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    Image.open(picture).convert("RGB").quantize(64).save(file, optimize=True)  # a third of the bytes
    return file


def _canvas(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    """Panels of this many inches altogether, with room for the shapes' names on the left and a heading above."""
    whole, tall = width + LEFT, height + TOP + BOTTOM
    figure = Figure(figsize=(whole, tall))
    edges = {"left": LEFT / whole, "right": 1.0, "bottom": BOTTOM / tall, "top": 1 - TOP / tall}
    figure.subplots_adjust(**edges, wspace=0.06)
    return figure, list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])


def _head(figure: Figure, title: str, what: str, subtitle: str, handles: list[Patch]) -> None:
    width, tall = figure.get_size_inches()
    left = 0.1 / width
    figure.text(left, 1 - 0.25 / tall, title, fontsize=14, fontweight="bold")
    figure.text(left, 1 - 0.45 / tall, what, fontsize=9, color=GREY)
    figure.text(left, 1 - 0.63 / tall, subtitle, fontsize=8, color=GREY)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left, 1 - 0.7 / tall), ncols=len(handles), frameon=False,
        borderaxespad=0, borderpad=0.3, handlelength=1.2, handleheight=0.9, columnspacing=1.4,
    )  # fmt: skip


def _ratios(rows: list[Row], title: str, subtitle: str) -> Figure:
    """One panel a pass; a bar starts at 1 and goes right where the peer takes longer, left and hatched where it wins."""
    passes, names = list(dict.fromkeys(row["pass"] for row in rows)), peers_of(rows)
    places = _places(rows, names)
    bars = 1 + max(at for peers in places.values() for at in peers.values())
    figure, axes = _canvas(4.6 * len(passes), BAR * (bars + 1), len(passes))
    ends = [row[key][n] for row in rows for key in ("ratio_p20", "ratio_p80") for n in row["ratio"]]
    widest = 1.9 * max(1.5, *ends)
    limits = (min(ends) * widest**-0.3 if min(ends) < 1 else 0.85), widest  # a loss needs room for its name
    for axis, which in zip(axes, passes, strict=True):
        _panel(axis, [row for row in rows if row["pass"] == which], places, names, limits)
        axis.set_title(which, loc="left", fontsize=10, fontweight="bold")
    axes[0].set_yticks([sum(at.values()) / len(at) for at in places.values()], [name for _, name in places])
    axes[0].set_ylim(bars - 0.2, -0.8)
    handles = [Patch(color=_colour(name, names), label=name) for name in names]
    handles.append(Patch(facecolor="white", edgecolor=LOSS, hatch="////", label="the peer wins"))
    what = "how many times longer the peer takes than ours (median; line: p20 to p80)"
    _head(figure, title, what, subtitle, handles)
    return figure


def _places(rows: list[Row], names: list[str]) -> dict[Shape, dict[str, int]]:
    """Where each shape's peers stand, counted from the top, with an empty place between shapes."""
    found: dict[Shape, dict[str, int]] = {}
    at = 0
    for shape in dict.fromkeys((row["op"], row["shape"]) for row in rows):
        mine = [n for n in names if any(n in r["ratio"] for r in rows if (r["op"], r["shape"]) == shape)]
        found[shape] = {name: at + n for n, name in enumerate(mine)}
        at += len(mine) + 1
    return found


def _panel(
    axis: Axes,
    rows: list[Row],
    places: dict[Shape, dict[str, int]],
    names: list[str],
    limits: tuple[float, float],
) -> None:
    for row in rows:
        for name in row["ratio"]:
            _bar(axis, row, name, places[row["op"], row["shape"]][name], _colour(name, names))
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(*limits)
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", size=0)
    axis.grid(axis="x", color=FAINT, linewidth=0.8)


def _bar(axis: Axes, row: Row, name: str, at: int, colour: str) -> None:
    ratio, low, high = (row[key][name] for key in ("ratio", "ratio_p20", "ratio_p80"))
    lost = ratio < 1
    look: dict[str, Any] = {"color": colour}
    if lost:
        look = {"facecolor": "white", "edgecolor": LOSS, "hatch": "////", "linewidth": 0.8}
    axis.barh(at, ratio - 1, left=1, height=0.82, **look)
    axis.plot([low, high], [at, at], color=INK, linewidth=0.8, alpha=0.55)
    axis.annotate(
        f"{times(ratio)} {name}" if lost else times(ratio),
        (min(ratio, low) if lost else max(1, ratio, high), at), (-4 if lost else 4, 0), textcoords="offset points",
        va="center_baseline", ha="right" if lost else "left", fontsize=7.5, color=LOSS if lost else INK,
        fontweight="bold" if name == best_peer(row) else "normal",
    )  # fmt: skip


def _colour(name: str, names: list[str]) -> str:
    strangers = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or OTHERS[strangers.index(name) % len(OTHERS)]


def _floors(rows: list[Row], subtitle: str) -> Figure:
    """The share of the floor, a bar for each row."""
    kinds = list(dict.fromkeys((row["dtype"], row["pass"]) for row in rows))
    hues, at, middles = dict(zip(kinds, HUES, strict=False)), 0, {}
    shapes = {shape: [r for r in rows if (r["op"], r["shape"]) == shape] for shape in map(_shape, rows)}
    figure, (axis,) = _canvas(6.4, BAR * (len(rows) + len(shapes)), 1)
    for shape, group in shapes.items():
        middles[shape] = at + (len(group) - 1) / 2
        for row in group:
            share = 100 * row["share_of_floor"]
            axis.barh(at, share, height=0.82, color=hues[row["dtype"], row["pass"]])
            axis.annotate(
                f"{share:.0f}", (share, at), (4, 0), textcoords="offset points", va="center", fontsize=7.5
            )
            at += 1
        at += 1
    axis.set_yticks(list(middles.values()), [name for _, name in middles])
    axis.set_ylim(at - 0.7, -0.8)
    axis.set_xlim(0, max(105.0, *(108 * row["share_of_floor"] for row in rows)))
    axis.axvline(100, color=INK, linewidth=1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    what = "what the row must compute and move, at this machine's best product and copy rates, over our time"
    handles = [Patch(color=hue, label=" ".join(kind)) for kind, hue in hues.items()]
    _head(figure, "Share of the floor", what, subtitle, handles)
    return figure


def _shape(row: Row) -> Shape:
    return row["op"], row["shape"]
