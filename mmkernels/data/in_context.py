"""MIMIC-IT's samples for Otter: instructions with several pictures, with a video, and with examples that came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GROUPS = ("image", "text", "video", "in_context")
IMAGE, ANSWER, CHUNK, END = "<image>", "<answer>", "<|endofchunk|>", "<|endoftext|>"


@dataclass(frozen=True)
class Record:
    """An instruction with its answer; `media` name its pictures, or the frames of its video in order."""

    instruction: str
    answer: str
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A text, the media that it reads as rows of frames (a picture is one frame), and where its answers lie: letters `[a, b)`
    from behind each <answer> to its end of chunk, and the end of the text.
    """

    text: str
    media: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[int, int], ...]


def write(record: Record, examples: Sequence[Record] = (), *, group: str, frames: int = 8) -> Sample:
    """`<image>User:{instruction} GPT:<answer>{answer}<|endofchunk|>` for every example and the record, then the end.

    "in_context": every example has its pictures before it. "image": all pictures of the sample stand before the first one,
    one <image> each; examples ask about them too. "video": one <image> for `frames` frames, evenly spaced with both ends.
    "text": one empty picture, as published, and no <image>.
    **Raises** ValueError for unknown groups, for media that a group needs or cannot have, and for frames below 1.
    """
    if group not in GROUPS:
        raise ValueError(f"group: got {group!r}, expected one of {', '.join(GROUPS)}")
    rounds = (*examples, record)
    if (group == "text" and any(r.media for r in rounds)) or (group != "text" and not record.media):
        wanted = "none" if group == "text" else "one or more"
        raise ValueError(f"media: got {len(record.media)} for group {group!r}, expected {wanted}")
    if group == "in_context" and not all(r.media for r in rounds):
        raise ValueError("media: got an example without, expected one or more for each in context")
    if frames < 1:
        raise ValueError(f"frames: got {frames}, expected 1 or more")
    media: list[tuple[str, ...]] = [("",)] if group == "text" else []
    if group == "video":
        at = np.linspace(0, len(record.media) - 1, min(frames, len(record.media))).round().astype(int)
        media.append(tuple(record.media[i] for i in at))
    elif group == "in_context":
        media += [(name,) for r in rounds for name in r.media]
    elif group == "image":
        media += [(name,) for name in record.media]
    text, answers = "", []
    for n, r in enumerate(rounds):
        shown = {"in_context": len(r.media), "text": 0}.get(group, len(media) * (n == 0))
        text += f"{IMAGE * shown}User:{r.instruction} GPT:{ANSWER}"
        answers.append((len(text), len(text) + len(r.answer + CHUNK)))
        text += r.answer + CHUNK
    return Sample(text + END, tuple(media), (*answers, (len(text), len(text + END))))


def resample(count: int, wanted: int, *, seed: int = 0) -> list[int]:
    """Which of `count` records an epoch takes: all for -1; a drawn subset; or whole repeats and a drawn rest.

    **Raises** ValueError for counts below 1 and for `wanted` that is neither -1 nor above 0.
    """
    if count < 1 or (wanted < 1 and wanted != -1):
        raise ValueError(f"count, wanted: got {count} and {wanted}, expected 1 or more, and -1 or 1 or more")
    if wanted == -1:
        return list(range(count))
    rng = np.random.default_rng(seed)
    rest = rng.choice(count, wanted % count, replace=False).tolist()
    return list(range(count)) * (wanted // count) + rest
