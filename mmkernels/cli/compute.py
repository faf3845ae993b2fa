"""What a picture costs: visual tokens, and the products of tower, connector and language model until the first word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels import models
from mmkernels.data import slicing
from mmkernels.layers.vision import VisionConfig


@dataclass(frozen=True)
class Picture:
    """Views by their patches, and what they become: `tokens` visual ones, `others` that only separate them."""

    views: tuple[int, ...]
    tokens: int
    others: int = 0


def tower(config: VisionConfig, picture: Picture) -> float:
    """FLOPs of the blocks that run, and of the patches: each view attends to itself and its class token."""
    d, total = config.width, 0.0
    for patches in picture.views:
        n = patches + config.class_token
        total += config.depth * (2 * n * (4 * d * d + 2 * d * config.hidden) + 4 * n * n * d)
        total += 2 * patches * 3 * config.patch_size**2 * d
    return total


def language(lm: Any, tokens: int) -> float:
    """FLOPs of a causal pass over `tokens`, with the logits of the last one."""
    d, block = lm.block.width, lm.block
    per_layer = 2 * tokens * (4 * d * d + 3 * d * block.hidden) + 2 * tokens * tokens * d
    return lm.layers * per_layer + 2 * d * lm.vocab


def projector(width: int, out: int, picture: Picture) -> float:
    return 2.0 * picture.tokens * (width * out + out * out)


def resampler(width: int, out: int, queries: int, picture: Picture) -> float:
    """Keys and values of every patch projected, queries over them, two products behind."""
    rows = sum(picture.views)
    return (
        2.0 * rows * (width * out + 2 * out * out)
        + 4 * queries * rows * out
        + 4 * len(picture.views) * queries * out**2
    )


def table() -> list[dict[str, Any]]:
    """LLaVA-1.5 at its own size, sliced to 672 x 1008, and LLaVA-UHD there, all with the 13B language model."""
    base: Any = models.config("llava-1.5-13b")
    uhd: Any = models.config("llava-uhd-13b")
    plan = slicing.llava_uhd(672, 1008)
    assert isinstance(plan, slicing.Plan) and plan.slice_size and plan.overview_size
    patch, side = uhd.vision.patch_size, base.vision.patches
    sizes = [*[plan.slice_size] * len(plan.boxes), plan.overview_size]
    views = tuple((w // patch) * (h // patch) for w, h in sizes)
    separators = int((plan.layout < 0).sum())
    slices = 672 * 1008 // base.vision.image_size**2
    rows = [
        ("llava-1.5-13b", "336x336", base, Picture((side,), side)),
        ("llava-1.5-13b, sliced", "672x1008", base, Picture((side,) * slices, side * slices)),
        ("llava-uhd-13b", "672x1008", uhd, Picture(views, plan.tokens - separators, separators)),
    ]
    found = [_row(*row, uhd.grid**2 if row[2] is uhd else 0) for row in rows]
    return [{**row, "share": row["flops"] / found[0]["flops"]} for row in found]


def _row(name: str, size: str, config: Any, picture: Picture, queries: int) -> dict[str, Any]:
    width, out = config.vision.width, config.lm.block.width
    connect = resampler(width, out, queries, picture) if queries else projector(width, out, picture)
    parts = {
        "tower": tower(config.vision, picture),
        "connector": connect,
        "language": language(config.lm, picture.tokens + picture.others),
    }
    return {
        "name": name, "image": size, "views": len(picture.views), "visual_tokens": picture.tokens,
        "tokens_per_view": picture.tokens // len(picture.views), "separators": picture.others,
        **parts, "flops": sum(parts.values()),
    }  # fmt: skip
