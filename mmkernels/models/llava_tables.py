"""Where LLaVA's parameters are in the authors' files and in Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.models.spliced import TOWER

# newest first: where a release of Hugging Face's keeps the tower, the language model and its head, and what is beside them
_LAYOUTS = (
    ("model.vision_tower.", "model.language_model.", "lm_head.", "model."),
    ("model.vision_tower.vision_model.", "model.language_model.", "lm_head.", "model."),
    ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.", ""),
)


def published(model: Any, source: str) -> Table:
    """The table of a whole `Llava`."""
    tower = model.vision.published("huggingface_clip")
    if source == "huggingface":
        return _huggingface(model, tower)
    joint = model.projector.published(model.projector.sources[0])
    table = model.lm.published(model.lm.config.family).under("lm.", "")
    table += tower.under("vision.", TOWER) + joint.under("projector.", "model.mm_projector.")
    table += Table((Rule("image_newline", ("model.image_newline",)),))
    return table + Table((), absent=() if source == "llava_next" else (r"vision\..*",))


def _huggingface(model: Any, tower: Table) -> Table:
    text = model.lm.published(model.lm.config.family).under("lm.", "")
    whole = Table((), ignored=text.ignored)
    for vision, decoder, head, rest in _LAYOUTS:
        keys = {"model.": decoder, "lm_head.": head}
        rules = tuple(replace(r, theirs=tuple(_moved(key, keys) for key in r.theirs)) for r in text.rules)
        joint = f"{rest}multi_modal_projector."
        whole += Table(rules) + tower.under("vision.", vision)
        parts = {"input": "linear_1", "output": "linear_2"}
        whole += Table(renames(**parts)).under("projector.", joint)
        whole += Table((Rule("image_newline", (f"{rest}image_newline",)),))
    return whole


def _moved(key: str, keys: dict[str, str]) -> str:
    found = next((start for start in keys if key.startswith(start)), "")
    return keys.get(found, "") + key.removeprefix(found)
