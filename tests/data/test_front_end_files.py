"""Batches of the image front end in which some pictures are bad: these are named, and the others are there."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from mmkernels import _native
from mmkernels.data import ImageError
from mmkernels.data.front_end import RULES, FrontEnd, jobs


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture
def files(tmp_path):
    """A good photograph, and one file of each kind of trouble: name -> (path, words of its error, "" if it is fine)."""
    cat = Image.fromarray(photographs.chelsea()[:60, :90])
    found = {}

    def save(name, words, image=cat, **options):
        image.save(tmp_path / name, **options)
        found[name] = (tmp_path / name, words)

    save("good.jpg", "")
    save("cmyk.jpg", "", cat.convert("CMYK"))
    save("grey16.png", "", Image.fromarray(np.full((40, 50), 0x80FF, dtype=np.uint16)))
    palette = cat.quantize(16)
    save("palette.png", "", palette, transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.png", "", cat, exif=exif)
    save("strip.png", "", Image.new("RGB", (100_000, 1), (9, 8, 7)))
    save(
        "animated.png", "an animation of 2 frames", save_all=True, append_images=[Image.new("RGB", cat.size)]
    )
    save("short.jpg", "damaged")
    whole = (tmp_path / "short.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(whole[: len(whole) // 2])
    header = struct.pack(">IIBBBBB", 19_000, 19_000, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 2376)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    found["bomb.png"] = (tmp_path / "bomb.png", "pixels|decompression bomb")
    found["none.png"] = (tmp_path / "none.png", "no such picture")
    return found


def test_bad_files_are_named_and_the_others_are_there(files):
    front = FrontEnd("llava_uhd_eccv")
    packed = front([path for path, _ in files.values()])
    for at, (name, (path, words)) in enumerate(files.items()):
        assert (at in packed.errors) == bool(words), name
        if words:
            assert any(word in packed.errors[at] for word in words.split("|"))
            assert name in packed.errors[at]
            assert packed.plans[at] is None
        else:
            alone = front([path])
            assert torch.equal(packed.patches[_rows(packed, at)], alone.patches), name
    turned = packed.plans[list(files).index("turned.png")]
    assert turned.size == (60, 90)


def _rows(packed, sample):
    views = (packed.sample == sample).nonzero()[:, 0]
    return slice(int(packed.offsets[views[0]]), int(packed.offsets[views[-1] + 1]))


def test_errors_can_be_raised_all_at_once(files):
    batch = [files[name][0] for name in ("good.jpg", "bomb.png", "none.png")]
    with pytest.raises(ImageError, match=r"sample 1: .*bomb\.png.*; sample 2: .*none\.png: no such picture"):
        FrontEnd("slime", on_error="raise")(batch)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((0, 5, 3), dtype=np.uint8), "5 x 0, which has no pixels"),
        (np.zeros((5, 5, 3), dtype=np.uint16), "got uint16 [5, 5, 3], expected uint8"),
        (np.zeros((5, 5, 4), dtype=np.uint8), "got uint8 [5, 5, 4]"),
        (Image.new("RGB", (0, 5)), "0 x 5, which has no pixels"),
        (Image.new("HSV", (4, 5)), "'HSV' are not supported"),
        (17, "got int, expected a path"),
        (np.broadcast_to(np.zeros((), dtype=np.uint8), (40_000, 40_000)), "more than the 33,554,432 pixels"),
    ],
)
def test_bad_pictures_in_memory(picture, words):
    packed = FrontEnd("monkey")([picture, np.zeros((9, 9, 3), dtype=np.uint8)])
    assert list(packed.errors) == [0]
    assert words in packed.errors[0]
    assert packed.errors[0].startswith("picture 0: ")
    assert packed.plans[1] is not None
    assert packed.sample.unique().tolist() == [1]


def test_too_many_slices_too_many_tokens_too_thin():
    large, small = np.zeros((700, 700, 3), dtype=np.uint8), np.zeros((300, 330, 3), dtype=np.uint8)
    capped = FrontEnd("llava_next", most=3)([large, small])
    assert "cut into 4 slices, expected at most 3" in capped.errors[0]
    full = FrontEnd("llava_next", context=2048)([large, small], text_tokens=[10, 20])
    assert full.errors == {
        0: "context: 2928 visual and 10 text tokens are 890 more than the 2048 that it holds"
    }
    assert full.plans[1].tokens == 1126
    thin = FrontEnd("fuyu")([np.zeros((100_000, 1, 3), dtype=np.uint8), small])
    assert "1 x 100000, which shrinks to 0 x 1080" in thin.errors[0]
    assert thin.hw.tolist() == [[10, 11]]


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_a_picture(rule):
    for batch in ([], [None, None]):
        packed = FrontEnd(rule)(batch)
        assert packed.patches.shape == (0, 2700 if rule == "fuyu" else 588)
        assert packed.hw.shape == (0, 2)
        assert packed.offsets.tolist() == [0]
        assert packed.plans == [None] * len(batch)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "fuyu"])
def test_a_strip_of_one_by_a_hundred_thousand(rule):
    strip = np.repeat(photographs.coffee()[:100, :1], 1000, 0)
    packed = FrontEnd(rule)([strip, strip.swapaxes(0, 1)])
    assert not packed.errors
    assert packed.patches.isfinite().all()


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "rule: got 'llava'", lambda: FrontEnd("llava")),
        (TypeError, "dtype: got torch.float64", lambda: FrontEnd("fuyu", dtype=torch.float64)),
        (ValueError, "on_error: got 'skip'", lambda: FrontEnd("fuyu", on_error="skip")),
        (ValueError, "mean, std", lambda: FrontEnd("fuyu", std=(1, 1, 0))),
        (ValueError, "rounding: got 'up'", lambda: FrontEnd("llava_next", rounding="up")),
        (TypeError, "pictures: got one str", lambda: FrontEnd("fuyu")("a.png")),
        (ValueError, "text_tokens: got 2, expected 1", lambda: FrontEnd("fuyu")([None], text_tokens=[1, 2])),
    ],
)
def test_bad_arguments_are_the_callers(error, words, make):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.skipif(_native.host is None, reason="_host is not built")
def test_the_compiled_front_end_refuses_jobs_that_do_not_fit():
    pixels, (placed, _) = (
        np.zeros((5, 6, 3), dtype=np.uint8),
        jobs._one(0, (0, 0, 6, 5), (14, 14), 14).placed(0),
    )
    front = FrontEnd("slime")
    for change, words in (
        ({"image": 1}, "no such picture"),
        ({"x1": 7}, "leaves its picture"),
        ({"y0": 5}, "leaves its picture"),
        ({"width": 0}, "out of its range"),
        ({"patch": 0}, "out of its range|width"),
        ({"columns": 0}, "without views"),
        ({"first": 1}, "beyond the output"),
        ({"real": 1, "width": 13}, "fills its canvas"),
    ):
        with pytest.raises(ValueError, match=words):
            front._fill([pixels], [jobs.Job(**{**vars(placed), **change})], torch.empty(1, 588), 1)
