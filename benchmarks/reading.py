"""How small a text can be: trained models read pages of growing size, with slices and without, as JSON and as a picture.

    python -m benchmarks.reading --run RUN [--run RUN] [--pages 256] [--out FOLDER]

A run is a folder of `mmkernels train --model llava-next-tiny` or of another model of the family. Letters have the same pixels
on every page, so on a larger page a tower of one size sees them smaller, unless the page is cut into tiles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.plots import FAINT, GREY, HUES, STYLE, save
from benchmarks.wanted import Row
from mmkernels import data
from mmkernels.infer import Captioner
from mmkernels.train import llava
from mmkernels.train.evaluate import evaluating

SIZES = ((32, 32), (48, 32), (64, 32), (96, 32), (64, 48), (64, 64))


def rows(run: Path, pages: int) -> Iterator[Row]:
    """A row for every size of a page, and for both ways to look where the model knows both."""
    reader = Captioner.from_checkpoint(run)
    model: Any = reader.model
    config = model.config
    name = json.loads((run / "run.json").read_text())["model"]
    readings = llava.readings(data.build("digits"), reader.tokenizer, config, 0)
    for sliced in (True, False) if config.aspect == "anyres" else (False,):
        for size in SIZES:
            with evaluating(model):
                found = llava.read(model, readings, pages, size, sliced=sliced)
            batch = readings.held_out_pages(0, 1, size, sliced=sliced)
            yield {"op": "reading", "model": name, "sliced": sliced, "shape": f"{size[0]} x {size[1]}", "pages": pages,
                   "tokens": len(batch.kinds), "read": found["pages read"],
                   "shuffled": found["pages read, shuffled"]}  # fmt: skip


def draw(record: dict[str, Any], file: Path) -> Path:
    """Shares of pages that are read to the last digit, over the size of the page."""
    series: dict[str, list[Row]] = {}
    for row in record["rows"]:
        label = f"{row['model']}, {'in tiles' if row['sliced'] else 'the whole picture alone'}"
        series.setdefault(label, []).append(row)
    with matplotlib.rc_context({**STYLE, "axes.spines.left": True}):
        figure = Figure(figsize=(7.2, 4.2))
        axis = figure.subplots()
        for (label, points), colour in zip(series.items(), HUES[::2] + HUES[1::2], strict=False):
            shapes = [row["shape"] for row in points]
            axis.plot(shapes, [100 * row["read"] for row in points], "o-", color=colour, ms=4, label=label)
        axis.set_xlabel("page, pixels; the tower sees 32 x 32, letters are 8 pixels wide")
        axis.set_ylabel("held-out pages read, %")
        axis.set_ylim(-2, 102)
        axis.grid(color=FAINT, linewidth=0.8)
        axis.legend(frameon=False, fontsize=8)
        axis.set_title("Small text is read in tiles", loc="left", fontsize=13, fontweight="bold", pad=22)
        about = f"{record['device']}  ·  torch {record['versions']['torch']}  ·  {record['rows'][0]['pages']} pages a point"
        axis.text(0, 1.02, about, transform=axis.transAxes, fontsize=8, color=GREY)
        return save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reading", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--run", type=Path, action="append", required=True, help="a run's folder; may be repeated"
    )
    parser.add_argument("--pages", type=int, default=256, help="of each size (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for reading.json and reading.png")
    options = parser.parse_args()
    if options.pages < 1:
        parser.error(f"--pages: got {options.pages}, expected 1 or more")
    torch.set_num_threads(1)
    record: dict[str, Any] = {**machine.describe("cpu"), "rows": []}
    for run in options.run:
        for row in rows(run, options.pages):
            record["rows"].append(row)
            print(
                f"{row['model']:16} {'tiles' if row['sliced'] else 'whole':6} {row['shape']:>8} {row['read']:7.1%}",
                flush=True,
            )
    out = options.out or machine.ROOT / "benchmarks" / "results" / machine.slug("cpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "reading.json").write_text(json.dumps(record, indent=1) + "\n")
    print(draw(record, out / "reading.png"))


if __name__ == "__main__":
    main()
