"""What recipes say of their data: shares, caps, core sets, forms of answers, samples in context."""

from __future__ import annotations

import re

import pytest

from mmkernels.data import formats, in_context, mixing
from mmkernels.data.core_set import frequent, overlap, select
from mmkernels.data.in_context import Record


def test_shares_add_up():
    assert mixing.shares({"a": 0.25, "b": 0.75}) == {"a": 0.25, "b": 0.75}
    for parts, match in (
        ({"a": 0.5, "b": 0.4}, r"shares: got 'a', 'b' that add up to 0\.9, expected 1"),
        ({"a": 1.5, "b": -0.5}, "shares: got 'b': -0.5"), ({}, "shares: got {}"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            mixing.shares(parts)


def test_a_source_gives_no_more_than_its_cap():
    sources = ["large"] * 30 + ["small"] * 4 + ["large"] * 30
    kept = mixing.cap(sources, 7)
    assert kept == sorted(kept) and [sources[i] for i in kept].count("large") == 7
    assert [i for i in kept if sources[i] == "small"] == [30, 31, 32, 33]
    assert mixing.cap(sources, 7) == kept and mixing.cap(sources, 7, seed=1) != kept
    alone = mixing.cap(["large"] * 30 + ["other"] * 4 + ["large"] * 30, 7)
    assert [i for i in alone if not 30 <= i < 34] == [i for i in kept if not 30 <= i < 34]
    assert max(i for i in kept if sources[i] == "large") > 33  # not the first ones
    assert mixing.cap([], 3) == []
    with pytest.raises(ValueError, match="limit: got 0"):
        mixing.cap(sources, 0)


TEXTS = [
    "A red Cat on a mat",
    "is the cat red?",
    "two dogs",
    "concatenate",
    "the traffic light, red cat",
    "nothing",
]


def test_concepts_are_whole_words_and_count_once():
    assert overlap(TEXTS, ["cat", "red", "Red", "traffic light"]) == [2, 2, 0, 0, 3, 0]
    assert overlap(["cat cat cat"], ["cat"]) == [1]
    assert frequent(TEXTS, ["Cat", "dogs", "cat"], least=2) == ["cat"]


def test_a_core_set_holds_the_most_concepts_and_balances_yes_and_no():
    answers = [""] * 6
    assert select(TEXTS, answers, ["cat", "red", "traffic light"], 4) == [4, 0, 1, 2]  # ties in their order
    assert select(TEXTS, answers, ["cat", "dogs"], 3, least=2) == [0, 1, 4]  # one word is too rare
    texts = ["cat " * 2 + word for word in ("red", "a", "red", "b", "red", "c")]
    said = ["Yes, it is", "yes", "No.", "yes", "Yesterday", "yes!"]
    assert select(texts, said, ["cat", "red"], 6) == [0, 2, 4]
    assert select(texts, said, ["cat", "red"], 6, yes_share=0.75) == [0, 2, 4, 1, 3]
    assert select(texts, said, ["cat", "red"], 6, yes_share=None) == [0, 2, 4, 1, 3, 5]
    assert select(texts, ["yes"] * 6, ["cat"], 6) == list(range(6))
    for choices, match in (
        ({"size": 0}, "size: got 0"),
        ({"yes_share": 1.0}, r"yes_share: got 1\.0"),
        ({"answers": []}, "answers: got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            select(**{"texts": texts, "answers": said, "keywords": ["cat"], "size": 2, **choices})


def test_forms_of_answers():
    assert (
        formats.ask("What is it?", "word")
        == "What is it?\nAnswer the question using a single word or phrase."
    )
    lettered = formats.ask(" Which? ", "letter", choices=("cat", "dog"))
    assert (
        lettered == "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert formats.ask("", "caption", tokens=("STOP", "A1")).endswith(
        "provided image.\nReference OCR token: STOP, A1"
    )
    assert formats.ask("Describe.") == "Describe."
    for words, match in (
        ({"form": "essay"}, "form: got 'essay', expected one of word"), ({"form": "letter"}, "choices: got 0"),
        ({"choices": ("a",)}, "choices: got 1 for 'plain'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            formats.ask("?", **words)


def answers_of(sample):
    return [sample.text[a:b] for a, b in sample.answers]


def test_otters_samples():
    first, second = Record("what?", "a cat", ("1.png",)), Record("and this?", "a dog", ("2.png", "3.png"))
    context = in_context.write(second, [first], group="in_context")
    assert context.text == (
        "<image>User:what? GPT:<answer>a cat<|endofchunk|>"
        "<image><image>User:and this? GPT:<answer>a dog<|endofchunk|><|endoftext|>"
    )
    assert context.media == (("1.png",), ("2.png",), ("3.png",))
    assert answers_of(context) == ["a cat<|endofchunk|>", "a dog<|endofchunk|>", "<|endoftext|>"]
    several = in_context.write(second, [Record("one?", "yes")], group="image")
    assert (
        several.text.startswith("<image><image>User:one? GPT:<answer>yes")
        and several.text.count("<image>") == 2
    )
    video = in_context.write(Record("?", "!", tuple("0123456789")), group="video", frames=4)
    assert video.media == (("0", "3", "6", "9"),) and video.text.count("<image>") == 1
    assert in_context.write(Record("?", "!", ("a", "b")), group="video", frames=9).media == (("a", "b"),)
    words = in_context.write(Record("?", "!"), group="text")
    assert words.media == (("",),) and "<image>" not in words.text
    for sample in (context, several, video, words):
        assert len(re.findall("<image>", sample.text)) == (len(sample.media) if sample is not words else 0)


@pytest.mark.parametrize(
    ("record", "choices", "match"),
    [
        (Record("?", "!"), {"group": "image"}, "media: got 0 for group 'image'"),
        (Record("?", "!", ("a",)), {"group": "text"}, "expected none"),
        (
            Record("?", "!", ("a",)),
            {"group": "in_context", "examples": [Record("?", "!")]},
            "got an example without",
        ),
        (Record("?", "!", ("a",)), {"group": "smell"}, "group: got 'smell'"),
        (Record("?", "!", ("a",)), {"group": "video", "frames": 0}, "frames: got 0"),
    ],
)
def test_impossible_samples_are_refused(record, choices, match):
    with pytest.raises(ValueError, match=match):
        in_context.write(record, **choices)


def test_an_epoch_takes_what_is_wanted():
    assert in_context.resample(3, -1) == [0, 1, 2]
    fewer = in_context.resample(10, 4)
    assert len(set(fewer)) == 4 and fewer == in_context.resample(10, 4)
    more = in_context.resample(3, 8)
    assert more[:6] == [0, 1, 2] * 2 and len(set(more[6:])) == 2
    with pytest.raises(ValueError, match="got 0 and 4"):
        in_context.resample(0, 4)
