"""How NExT-GPT's texts are written: `### Human: <Img>[input]</Img> instruction, ### Assistant: answer [signals] ###`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HUMAN, OPEN, CLOSE, ASSISTANT = "### Human: ", "<Img>", "</Img> ", "\n### Assistant: "
CAPTION = "generate a caption"  # the instruction of the first stage
Encode = Callable[[str], list[int]]


def prompt(instruction: str, places: Sequence[int], encode: Encode, bos: int) -> list[int]:
    """Ids up to the answer; each of `places` (an input of any kind) stands in its own frame, before the instruction."""
    inputs = [token for place in places for token in (*encode(OPEN), place, *encode(CLOSE))]
    return [bos, *encode(HUMAN), *inputs, *encode(instruction + ASSISTANT)]


def answer(text: str, signals: Sequence[int], encode: Encode, end: int) -> list[int]:
    """Ids of an answer: its words, the signal tokens of what it asks for, a new line and the mark that ends a turn."""
    return [*encode(text), *signals, *encode("\n"), end]
