"""LLaVA's text side: conversations as the published templates write them, where pictures stand in them, what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmkernels.models.base import IGNORE
from mmkernels.primitives import _check

IMAGE = "<image>"
Encode = Callable[[str], Sequence[int]]  # with its own beginning of text, as tokenizers of language models do
Turns = Sequence[
    tuple[str, str | None]
]  # questions and answers; the last answer may be None: it is to be written


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    - "two": the system, then `user: question` and `assistant: answer` with `separators` behind them, in turn.
    - "signal": the system and an empty line, then each turn as `### role: text` on a line, `### ` at the end.
    - "plain": the first question's image token, the answer and a newline.
    """

    style: str
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    separators: tuple[str, str] = (" ", "</s>")

    def prompt(self, turns: Turns) -> str:
        """The text of a conversation; it ends where the assistant is to speak if the last answer is None."""
        _check.choice("style", self.style, ("two", "signal", "plain"))
        if not turns:
            raise ValueError("turns: got none, expected at least one question")
        if self.style == "plain":
            return IMAGE + (f"{turns[0][1]}\n" if turns[0][1] is not None else "")
        if self.style == "signal":
            return "".join(self.pieces(turns)) + ("### " if turns[-1][1] is not None else "")
        text = self.system + self.separators[0] if self.system else ""
        for question, answer in turns:
            text += f"{self.roles[0]}: {question}{self.separators[0]}{self.roles[1]}:"
            text += "" if answer is None else f" {answer}{self.separators[1]}"
        return text

    def pieces(self, turns: Turns) -> list[str]:
        """The beginning and each turn of a "signal" conversation."""
        said = [turn for pair in turns for turn in zip(self.roles, pair, strict=True)]
        lines = [f"### {role}: {text}\n" if text is not None else f"### {role}:" for role, text in said]
        return [f"{self.system}\n\n" if self.system else "", *lines]


_GIVES = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_ASK = "A chat between a curious {0} and an artificial intelligence assistant. " + _GIVES
_YI = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. Read all the "
    "images carefully, and respond to the human's questions with informative, helpful, detailed and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
TEMPLATES = {
    "v0": Template("signal", _ASK.format("human"), ("Human", "Assistant")),
    "v1": Template("two", _ASK.format("user")),
    "plain": Template("plain"),
    "short": Template("two", separators=(" ", "<|endoftext|>")),  # of models that are no larger than a test
    "yi": Template("signal", _YI, ("Human", "Assistant")),
}


def place_image(question: str) -> str:
    """A question about a picture with the image token on a line of its own before it, wherever it stood."""
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}" if IMAGE in question else question


def ask(template: str, question: str, images: int = 1) -> str:
    """A question about pictures as a template of `TEMPLATES` writes it, up to its answer; each picture on a line of its own,
    before the question unless it says itself where they stand.
    """
    lines = question.strip() if IMAGE in question else f"{IMAGE}\n" * images + question.strip()
    return TEMPLATES[template].prompt([(lines, None)])


def tokenize(text: str, encode: Encode, *, image: int = -200, begin: int | None = 1) -> list[int]:
    """Ids of a text with one `image` for each `<image>`: chunks are encoded apart, and only the first keeps its `begin`."""
    chunks = [list(encode(chunk)) for chunk in text.split(IMAGE)]
    skip = int(bool(chunks[0]) and chunks[0][0] == begin)
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, image, *chunk[skip:]]
    return ids


def conversation(
    turns: Turns,
    encode: Encode,
    template: str | Template = "v1",
    *,
    image: int = -200,
    begin: int | None = 1,
    legacy: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation for training, by a template or its name in `TEMPLATES`.

    "plain" predicts all but the beginning and the image. "two" predicts answers and what separates them from the next question;
    it counts tokens as published, two of each question's belonging to its answer (the beginning and the space that
    SentencePiece writes), one less after the first for tokenizers that are not `legacy`; where the counts do not add up,
    nothing of the sample is predicted. "signal" predicts all but the beginning and the users' turns, whose first two tokens
    end the answer before. Published counts are kept: each piece is encoded apart, with a beginning of its own.
    """
    chosen = TEMPLATES[template] if isinstance(template, str) else template
    if any(answer is None for _, answer in turns):
        raise ValueError("turns: got one without an answer, expected answers to all questions")
    text = chosen.prompt(turns)

    def count(piece: str) -> int:
        return len(tokenize(piece, encode, image=image, begin=begin))

    ids = tokenize(text, encode, image=image, begin=begin)
    if chosen.style == "plain":
        first = count(IMAGE)
        return ids, [IGNORE] * first + ids[first:]
    if chosen.style == "signal":
        return ids, _signal_labels(ids, [count(piece) for piece in chosen.pieces(turns) if piece], chosen)
    return ids, _two_labels(ids, text, chosen, count, legacy)


def _two_labels(
    ids: list[int], text: str, template: Template, count: Callable[[str], int], legacy: bool
) -> list[int]:
    labels, at = list(ids), 1
    labels[:1] = [IGNORE]
    answers = f"{template.separators[0]}{template.roles[1]}: "
    for number, said in enumerate(text.split(template.separators[1])):
        parts = said.split(answers)
        if not said or len(parts) != 2:
            break
        less = int(number > 0 and not legacy)
        asked, length = count(parts[0] + answers) - 2 - less, count(said) - less
        labels[at : at + asked] = [IGNORE] * len(labels[at : at + asked])
        at += length
    return labels if at == len(ids) else [IGNORE] * len(ids)


def _signal_labels(ids: list[int], lengths: list[int], template: Template) -> list[int]:
    labels, at = list(ids), lengths[0] if template.system else 0
    labels[:at] = [IGNORE] * at
    for number, length in enumerate(lengths[bool(template.system) :]):
        if number % 2 == 0:
            hidden = slice(at + 2, min(at + length, len(labels)))
            labels[hidden] = [IGNORE] * len(labels[hidden])
        at += length
    return labels
