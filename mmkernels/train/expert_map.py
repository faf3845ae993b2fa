"""Which experts a run's model uses, for pictures and for words, as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmkernels.data import store

NAME = "experts.png"


def draw_experts(use: dict[str, Any], out: Path) -> Path:
    """Draws `expert_use`: a panel for each modality, a row for each layer, a column for each expert.

    **Raises** ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in use if name != "layers"]
    layers, experts = use["layers"], len(use[names[0]][0])
    figure = Figure(figsize=(2 + 3 * len(names), 1.6 + 0.35 * len(layers)), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    drawn: list[Any] = []
    for axes, name in zip(panels, names, strict=True):
        drawn.append(axes.imshow(use[name], vmin=0, vmax=1, cmap="viridis", aspect="auto"))
        axes.set(
            title=name, xlabel="expert", xticks=range(experts), yticks=range(len(layers)), yticklabels=layers
        )
        for row, shares in enumerate(use[name]):
            for column, share in enumerate(shares):
                colour = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    panels[0].set_ylabel("layer")
    figure.colorbar(drawn[-1], ax=panels, label="share of routes")
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    store.write(out / NAME, png.getvalue())
    return out / NAME
