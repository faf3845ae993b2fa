"""Where images stand in Qwen-VL's text, what of it is predicted, and how boxes are written."""

from __future__ import annotations

import pytest
import torch

from mmkernels import models
from mmkernels.models import qwen_text as text

CONFIG = models.config("qwen_vl-tiny")
TOKENS, MARKS = CONFIG.tokens, CONFIG.marks
_SPECIAL = {"I": 2, "J": 507, "s": 508, "<": 509, "n": 510, "A": 511, "C": 3, "E": 1, ".": 0}


def ids(*rows: str) -> torch.Tensor:
    """One id a letter: I image, s slot, J its end; < a turn, n newline, A "assistant", C its end; E of the text, . padding."""
    return torch.tensor([[_SPECIAL.get(c, ord(c)) for c in row] for row in rows])


def kept(input_ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """The rows' letters where there is a label, "-" elsewhere; labels are the ids themselves."""
    assert torch.equal(labels[labels != -100], input_ids[labels != -100])
    names = {v: k for k, v in _SPECIAL.items()}
    return [
        "".join("-" if y == -100 else names.get(x, chr(x)) for x, y in zip(row, label, strict=True))
        for row, label in zip(input_ids.tolist(), labels.tolist(), strict=True)
    ]


def test_places():
    image, place = text.image_places(ids("aIssJbIssJ"), TOKENS.image)
    assert image.tolist() == [[-1, 0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert place.tolist() == [[-1, -1, 0, 1, 2, 3, -1, 0, 1, 2]]


def test_all_text_is_predicted_and_no_image():
    given = ids("aIssJbcIssJdE..", "..IssJabcdefghE")
    assert kept(given, text.text_labels(given, TOKENS, MARKS, 2)) == ["a----bc----dE--", "------abcdefghE"]
    mask = given != 0
    mask[:, -3:] = False
    assert kept(given, text.text_labels(given, TOKENS, MARKS, 2, mask))[1] == "------abcdef---"


def test_chatml_predicts_answers_and_the_frame_of_every_turn():
    given = ids("<xnabCn<ynIssJcdCn<AnefgCn<ynhCn<AniCn...")
    want = "<----Cn<--------Cn<--efgCn<---Cn<--iCn---"
    assert kept(given, text.chatml_labels(given, TOKENS, MARKS)) == [want]
    cut = ids("<Anabc", "abn<An", "<AnCn<")  # cut short, begun in the middle, nothing said
    assert kept(cut, text.chatml_labels(cut, TOKENS, MARKS)) == ["<--abc", "---<--", "<--Cn<"]
    mask = torch.ones_like(given, dtype=torch.bool)
    mask[:, 20:] = False
    assert kept(given, text.chatml_labels(given, TOKENS, MARKS, mask)) == [want[:20].ljust(41, "-")]


def test_a_newline_inside_an_answer_is_part_of_it():
    given = ids("<AnanbnCn", "<ynanbnCn")
    assert kept(given, text.chatml_labels(given, TOKENS, MARKS)) == ["<--anbnCn", "<------Cn"]


def test_a_conversation():
    turns = [("y", "Iab"), ("assistant", "cnd"), ("y", "e")]
    got = text.chatml_ids(turns, lambda letters: ids(letters)[0].tolist(), TOKENS, MARKS)
    assert torch.equal(torch.tensor([got]), ids("<ynIabCn<AncndCn<yneCn"))


def test_a_question_about_pictures():
    """Each picture has its published line; a text that holds its pictures has none added."""

    def encode(letters: str) -> list[int]:
        return ids(letters.replace("Picture ", "p").replace(": ", "").replace("user", "y"))[0].tolist()

    got = [text.chat_prompt(asked, n, encode, TOKENS, MARKS) for asked, n in (("ab", 2), ("aIb", 0))]
    assert torch.equal(torch.tensor(got[:1]), ids("<ynp1Inp2InabCn<An"))
    assert torch.equal(torch.tensor(got[1:]), ids("<ynaIbCn<An"))


def test_boxes():
    assert text.box_text((0, 0, 640, 480), (640, 480)) == "<box>(0,0),(999,999)</box>"
    assert text.box_text((64, 120, 320.5, 240), (640, 480)) == "<box>(100,250),(500,500)</box>"
    written = text.ref_text("the cat", [text.box_text((64, 120, 320, 240), (640, 480))])
    assert written == "<ref>the cat</ref><box>(100,250),(500,500)</box>"
    assert text.boxes_in(f"{written} and {written}") == [(100, 250, 500, 500)] * 2
    assert text.boxes_in(written, (640, 480)) == [(64.0, 120.0, 320.0, 240.0)]
    assert text.boxes_in("<box>(1,2),(3,1000)</box><box>(1,2)</box>") == []
    assert text.picture_text(2, "a.png") == "Picture 2: <img>a.png</img>\n"
    for box in ((-1, 0, 5, 5), (0, 0, 641, 5), (9, 0, 5, 5), (0, float("nan"), 5, 5)):
        with pytest.raises(ValueError, match=r"box: got .* inside 640 x 480"):
            text.box_text(box, (640, 480))
    with pytest.raises(ValueError, match="width: got 0"):
        text.box_text((0, 0, 0, 0), (0, 480))
    with pytest.raises(ValueError, match="number: got 0"):
        text.picture_text(0, "a.png")
