"""The default data: what is held out stays out, batches are numbered, and the last picture decides the last caption."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from mmkernels import data
from mmkernels.data import digits as digits_module
from mmkernels.data import images, stamps
from mmkernels.data.dataset import Picture, view
from mmkernels.data.sequences import MAX_IMAGES


@pytest.fixture(scope="module")
def sequences(digits, tokenizer):
    return data.Sequences(digits, tokenizer, 32)


def rows(batch):
    """Text of each row without its padding."""
    return [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_unknown_data_names_the_nearest():
    with pytest.raises(ValueError, match="'digit' is unknown, did you mean 'digits'"):
        data.build("digit")


def test_every_caption_has_pictures_on_both_sides(digits):
    assert (
        len(set(digits.captions)) == len(digits.captions) == len(digits.train) == len(digits.held_out) == 20
    )
    for split in (digits.train, digits.held_out):
        assert all(p.caption == c for c, pictures in enumerate(split) for p in pictures)
        assert all(split)
    assert sum(map(len, digits.train)) + sum(map(len, digits.held_out)) == 1797 + 2 * 10


def test_no_digit_is_in_both_splits(digits):
    def scans(split):
        return {p.pixels.tobytes() for pictures in split[:10] for p in pictures}

    assert not scans(digits.train) & scans(digits.held_out)


def test_no_cut_of_a_photograph_is_in_both_splits():
    """Pixels that name their own place show which corners were drawn."""
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
    picture = Picture(np.stack([x, y, y], -1), 0, zoom=(0.5, 0.5))
    rng, corners = np.random.default_rng(0), defaultdict(set)
    for held_out in (False, True):
        for _ in range(400):
            left, top, _ = view(picture, rng, 100, held_out=held_out)[0, 0].astype(int)
            if 2 <= left % 25 <= 22 and 2 <= top % 25 <= 22:  # resizing blurs the borders of the cells
                corners[held_out].add((left // 25, top // 25))
    assert not corners[False] & corners[True]
    assert len(corners[False] | corners[True]) == 16


def test_batches_are_numbered_and_seeded(digits, tokenizer, sequences):
    again = data.Sequences(digits, tokenizer, 32)
    for draw in ("pairs", "interleaved", "held_out", "pictures"):
        first, same = getattr(sequences, draw)(3, 4), getattr(again, draw)(3, 4)
        fields = zip(first if draw == "pictures" else vars(first).values(),
                     same if draw == "pictures" else vars(same).values(), strict=True)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in fields), draw
    other = data.Sequences(digits, tokenizer, 32, seed=1).interleaved(3, 4)
    assert other.images.shape != sequences.interleaved(3, 4).images.shape or not torch.equal(
        other.images, sequences.interleaved(3, 4).images
    )
    assert not torch.equal(sequences.pairs(3, 8).captions, sequences.pairs(4, 8).captions)


def test_a_document_is_chunks_of_image_caption_end(sequences, tokenizer, digits):
    batch = sequences.interleaved(0, 64)
    lone = 0
    for ids, pictures, (start, end), caption in zip(
        rows(batch), batch.images, batch.answers.tolist(), batch.captions.tolist(), strict=True
    ):
        count = ids.count(tokenizer.image)
        assert pictures.flatten(1).any(1).tolist() == [True] * count + [False] * (MAX_IMAGES - count)
        assert ids[0] == tokenizer.image
        assert ids[-1] == tokenizer.end_of_text
        assert ids[start - 1] == tokenizer.image
        assert ids[start:end] == [*tokenizer.encode(digits.captions[caption]), tokenizer.end_of_chunk]
        assert end == len(ids) - 1
        assert ids.count(tokenizer.end_of_chunk) in (1, count)
        lone += ids.count(tokenizer.end_of_chunk) == 1 and count > 1
    assert 5 < lone < 30
    assert batch.input_ids.shape[1] <= 256


def test_pairs_are_one_picture_and_at_most_32_tokens(sequences, tokenizer):
    batch = sequences.pairs(0, 32)
    assert batch.images.shape[:2] == (32, 1)
    assert all(ids.count(tokenizer.image) == 1 for ids in rows(batch))
    assert batch.input_ids.shape[1] <= 32


def test_long_documents_are_cut(digits):
    wordy = data.Dataset(
        "wordy", tuple(c + " and so on" * 40 for c in digits.captions), digits.train, digits.held_out
    )
    cut = data.Sequences(wordy, data.Tokenizer.train(digits.captions, 512), 32)
    assert cut.pairs(0, 4).input_ids.shape[1] == 32
    batch = cut.interleaved(0, 8)
    assert batch.input_ids.shape[1] == 256
    assert batch.answers.max() <= 256


def test_documents_of_one_picture_are_half_as_frequent(sequences):
    counts = torch.cat([(sequences.interleaved(n, 64).images.flatten(2).any(2)).sum(1) for n in range(8)])
    share = torch.bincount(counts, minlength=7)[1:] / len(counts)
    assert 0.05 < share[0] < 0.13  # 1/11
    assert (share[1:] > 0.13).all()  # 2/11


def test_the_same_text_before_has_another_answer_with_another_last_picture(digits, tokenizer):
    """What precedes the last caption does not tell it: only the last picture does."""
    sequences = data.Sequences(digits, tokenizer, 4)
    answers, repeated = defaultdict(set), 0
    for number in range(12):
        batch = sequences.held_out(number, 64)
        for ids, (start, _), caption in zip(
            rows(batch), batch.answers.tolist(), batch.captions.tolist(), strict=True
        ):
            repeated += tuple(ids[:start]) in answers
            answers[tuple(ids[:start])].add(caption)
    assert repeated > 100
    assert max(map(len, answers.values())) > 15
    captions = torch.cat([sequences.held_out(n, 64).captions for n in range(10)])
    assert torch.bincount(captions, minlength=20).max() / len(captions) < 0.1  # no caption is a good guess


def test_every_draw_differs_from_the_zero_picture(sequences):
    pixels, captions = sequences.pictures(0, 64)
    assert pixels.shape == (64, 3, 32, 32)
    assert pixels.flatten(1).std(1).min() > 0
    assert set(captions.tolist()) <= set(range(20))
    held_out, _ = sequences.pictures(0, 64, held_out=True)
    assert not torch.equal(pixels, held_out)


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"scikit-learn and scikit-image.*pip install .mmkernels\[train\]"):
        digits_module.build()


def test_stamps_are_pictures_with_a_first_line_beside_them(tmp_path):
    from PIL import Image

    for name, text in (
        ("frog", "A frog.\nde.utf8=Ein Frosch."),
        ("toad", "A frog."),
        ("ox", "An ox"),
        ("mute", ""),
    ):
        Image.new("RGBA", (90, 70), (10, 200, 30, 128)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    found = stamps.build(tmp_path)
    assert found.captions == ("a frog", "an ox")
    assert [len(p) for p in found.train] == [2, 1]
    pixels, caption = found.draw(np.random.default_rng(0), 16, held_out=True)
    assert pixels.shape == (16, 16, 3)
    assert caption in (0, 1)


def test_missing_stamps_say_how_to_install_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        stamps.build(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no picture with a text"):
        stamps.build(tmp_path)


def test_a_bad_stamp_names_its_file(tmp_path):
    (tmp_path / "frog.png").write_bytes(b"not a picture")
    (tmp_path / "frog.txt").write_text("A frog.")
    with pytest.raises(images.ImageError, match=r"frog\.png"):
        stamps.build(tmp_path)
