"""LLaVA's conversations: the published prompts, where pictures stand, and which tokens are predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmkernels.models.llava_text import TEMPLATES, conversation, place_image, tokenize

TALK = [("<image>\nwhat is it?", "a cat"), ("why?", "it purrs")]
SYSTEM = TEMPLATES["v1"].system


class Pieces:
    """Like LLaMA's tokenizer: 1 begins every text, words hold the space before them, a space alone at the end is a token, and
    `</s>` and a word's newline stand alone. Ids tell words, so that they can be read back.
    """

    def __init__(self, begin: bool = True):
        self.words: list[str] = ["<unk>", "<s>"]
        self.begin = begin

    def __call__(self, text: str) -> list[int]:
        marked = text.replace("</s>", " </s> ").replace("\n", " \n ")
        split = marked.split(" ") if not text.endswith(" ") else [*marked[:-1].split(" "), "_"]
        ids = [1] if self.begin else []
        for word in split:
            if word:
                if word not in self.words:
                    self.words.append(word)
                ids.append(self.words.index(word))
        return ids

    def read(self, ids: list[int]) -> str:
        return " ".join(
            "<image>" if i == -200 else "" if i == -100 else self.words[i] for i in ids if i != -100
        )


def test_the_published_prompts():
    asked = [("<image>\nwhat is it?", None)]
    assert TEMPLATES["v1"].prompt(asked) == f"{SYSTEM} USER: <image>\nwhat is it? ASSISTANT:"
    assert TEMPLATES["v1"].prompt(TALK) == (
        f"{SYSTEM} USER: <image>\nwhat is it? ASSISTANT: a cat</s>USER: why? ASSISTANT: it purrs</s>"
    )
    assert SYSTEM == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions."
    )
    assert TEMPLATES["plain"].prompt([("<image>", "a cat")]) == "<image>a cat\n"
    for name in ("v0", "yi"):
        prompt = TEMPLATES[name].prompt(asked)
        assert prompt == f"{TEMPLATES[name].system}\n\n### Human: <image>\nwhat is it?\n### Assistant:"
        assert (
            TEMPLATES[name]
            .prompt(TALK)
            .endswith("### Assistant: a cat\n### Human: why?\n### Assistant: it purrs\n### ")
        )
    assert "好奇的人类" in TEMPLATES["yi"].system
    assert replace(TEMPLATES["v1"], system="").prompt(asked) == "USER: <image>\nwhat is it? ASSISTANT:"


def test_an_image_comes_first_and_is_one_token():
    assert place_image("what is it? <image>") == "<image>\nwhat is it?"
    assert place_image("why?") == "why?"
    encode = Pieces()
    ids = tokenize("see <image> and <image> here", encode)
    assert encode.read(ids) == "<s> see _ <image> and _ <image> here"
    assert tokenize("<image>a", encode)[:2] == [1, -200] and tokenize("a b", encode) == encode("a b")


def test_answers_alone_are_predicted_by_v1():
    encode = Pieces()
    ids, labels = conversation(TALK, encode)
    assert len(ids) == len(labels) and all(b in (a, -100) for a, b in zip(ids, labels, strict=True))
    assert encode.read(labels) == "a cat </s> it purrs </s>"
    assert labels[0] == -100 and ids.count(-200) == 1


def test_counts_that_do_not_add_up_hide_the_sample():
    """A tokenizer without a beginning counts one less for every round than the published code takes back."""
    _, labels = conversation(TALK, Pieces(begin=False), begin=None)
    assert set(labels) == {-100}


def test_a_tokenizer_that_is_not_legacy_counts_one_less_after_the_first():
    """Such a one writes no token for the beginning of what follows `</s>`: its rounds are a token shorter there."""
    encode = Pieces()
    _, labels = conversation(TALK, encode, legacy=False)
    assert set(labels) == {-100}  # this one is legacy, so its rounds do not add up
    one = conversation(TALK[:1], encode, legacy=False)
    assert one == conversation(TALK[:1], encode)


def test_a_caption_is_all_that_plain_predicts():
    encode = Pieces()
    ids, labels = conversation([("<image>", "a cat")], encode, "plain")
    assert ids[:2] == [1, -200] and labels[:2] == [-100, -100] and labels[2:] == ids[2:]
    assert encode.read(labels).strip() == "a cat"


@pytest.mark.parametrize("name", ["v0", "yi"])
def test_users_are_not_predicted_but_for_what_ends_an_answer(name):
    """Without a beginning of their own pieces count exactly: `### Human:` ends an answer, the rest of a question is hidden."""
    encode = Pieces(begin=False)
    ids, labels = conversation(TALK, encode, name, begin=None)
    told = " ".join(encode.read(labels).split())
    assert told == "### Human: ### Assistant: a cat ### Human: ### Assistant: it purrs ### _"
    system = len(encode(f"{TEMPLATES[name].system}\n\n"))
    assert set(labels[:system]) == {-100} and ids[-1] == labels[-1]


def test_bad_conversations_are_refused_by_name():
    encode = Pieces()
    for match, call in (
        ("turns: got none", lambda: conversation([], encode)),
        ("turns: got one without an answer", lambda: conversation([("why?", None)], encode)),
        ("style: got 'three'", lambda: replace(TEMPLATES["v1"], style="three").prompt(TALK)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
