from __future__ import annotations

import pytest

from mmkernels.data import Tokenizer
from mmkernels.data.tokenizer import SPECIAL


def test_any_text_survives(tokenizer, digits):
    for text in (*digits.captions, "Ünïcode, 漢字 🦊\n\ttabs", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= 512


def test_words_of_captions_are_short(tokenizer, digits):
    assert max(len(tokenizer.encode(caption)) for caption in digits.captions) <= 7


def test_special_tokens_are_one_id_each_and_not_decoded(tokenizer):
    assert tokenizer.encode("".join(SPECIAL)) == [0, 1, 2, 3]
    assert tokenizer.encode("<image>a<|endofchunk|>")[::2] == [tokenizer.image, tokenizer.end_of_chunk]
    assert tokenizer.decode([2, *tokenizer.encode("a cat"), 3, 1, 0]) == "a cat"


def test_training_is_deterministic_and_blind_to_order(tokenizer, digits):
    for captions in (digits.captions, digits.captions[::-1]):
        assert Tokenizer.train(captions, 512).text() == tokenizer.text()


def test_a_file_brings_it_back(tokenizer, tmp_path, digits):
    (tmp_path / "t.json").write_text(tokenizer.text())
    again = Tokenizer.load(tmp_path / "t.json")
    assert [again.encode(c) for c in digits.captions] == [tokenizer.encode(c) for c in digits.captions]


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json"])
def test_other_files_are_refused_by_name(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json: not a tokenizer"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_tokenizer_with_other_special_tokens_is_refused(tokenizer, tmp_path):
    (tmp_path / "t.json").write_text(tokenizer.text().replace("<image>", "<picture>"))
    with pytest.raises(ValueError, match="first ids are not <pad>"):
        Tokenizer.load(tmp_path / "t.json")
