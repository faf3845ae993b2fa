"""Pictures with captions, from disk to batches; used by training and inference, knows neither them nor the models."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

from mmkernels.data import digits, shards, stamps
from mmkernels.data.cuttings import CutBatch as CutBatch
from mmkernels.data.cuttings import Cuttings as Cuttings
from mmkernels.data.dataset import Dataset as Dataset
from mmkernels.data.dialogues import Dialogues as Dialogues
from mmkernels.data.grounding import Grounding as Grounding
from mmkernels.data.grounding import SceneBatch as SceneBatch
from mmkernels.data.images import ImageError as ImageError
from mmkernels.data.mixtures import Mixtures as Mixtures
from mmkernels.data.pairs import Pairs as Pairs
from mmkernels.data.readings import Photographs as Photographs
from mmkernels.data.readings import ReadingBatch as ReadingBatch
from mmkernels.data.readings import Readings as Readings
from mmkernels.data.sequences import Batch as Batch
from mmkernels.data.sequences import Sequences as Sequences
from mmkernels.data.tokenizer import Tokenizer as Tokenizer
from mmkernels.data.videos import VideoBatch as VideoBatch
from mmkernels.data.videos import Videos as Videos

_BUILDERS: dict[str, Callable[[], Dataset]] = {"digits": digits.build, "stamps": stamps.build}


def names() -> list[str]:
    """The datasets that `build` knows."""
    return sorted(_BUILDERS)


@functools.cache
def build(name: str) -> Dataset:
    """A dataset by name, read once a process; `shards:FOLDER` is what the shards of a folder hold (see `data.shards`).

    **Raises** ValueError for an unknown name; ImportError, FileNotFoundError when its pictures are not installed.
    """
    kind, _, folder = name.partition(":")
    if kind == "shards" and folder:
        dataset, report = shards.build(Path(folder))
        if "0 skipped" not in report:
            warnings.warn(f"{folder}: {report}", stacklevel=2)
        return dataset
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, 1, 0) or names()
        raise ValueError(
            f"data {name!r} is unknown, did you mean {near[0]!r}? There are: {', '.join(names())}"
        )
    return _BUILDERS[name]()
