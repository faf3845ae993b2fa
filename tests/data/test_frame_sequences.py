"""Frame sequences from disk: pages, animations and folders of stills, as many as asked for, and nothing unsafe."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmkernels.data import frames
from mmkernels.data.images import ImageError


def stills(count: int, size: tuple[int, int] = (12, 10)) -> list[Image.Image]:
    """Frame i is of grey 10 i."""
    return [Image.new("RGB", size, (10 * i,) * 3) for i in range(count)]


def greys(found: list[Image.Image]) -> list[int]:
    assert all(image.mode == "RGB" for image in found)
    return [image.getpixel((1, 1))[0] for image in found]  # type: ignore[index]


@pytest.fixture(params=["a.tif", "a.gif", "a.webp", "a.png", "folder"])
def video(request, tmp_path):
    """Nine frames of rising grey."""
    path, made = tmp_path / request.param, stills(9)
    if request.param == "folder":
        path.mkdir()
        for i, image in enumerate(made):
            image.save(path / f"{i:03}.png")
        (path / "notes.txt").write_text("not a picture")
    else:
        options = {"lossless": True} if path.suffix == ".webp" else {}
        made[0].save(path, save_all=True, append_images=made[1:], **options)
    return path


def test_frames_come_in_order(video):
    assert greys(frames.load(video)) == [10 * i for i in range(9)]


def test_chosen_frames_are_evenly_spaced_with_both_ends(video):
    assert greys(frames.load(video, 3)) == [0, 40, 80]
    assert greys(frames.load(video, 1)) == [0]
    assert len(frames.load(video, 50)) == 9


def test_a_real_multi_page_image():
    skimage_data = pytest.importorskip("skimage.data")
    found = frames.load(f"{skimage_data.data_dir}/multipage.tif")
    assert [image.size for image in found] == [(10, 15)] * 2
    assert not np.array_equal(*map(np.asarray, found))


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    stills(2)[1].save(tmp_path / "a.png")
    assert greys(frames.load(tmp_path / "a.png")) == [10]


def test_what_cannot_be_watched_is_named(tmp_path, monkeypatch):
    made = stills(4)
    made[0].save(tmp_path / "a.gif", save_all=True, append_images=made[1:])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "a.gif").read_bytes()[:30])
    (tmp_path / "text.tif").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    for name, why in (
        ("none.gif", "none.gif: no such video"), ("cut.gif", "cut.gif: not a sequence"),
        ("text.tif", "text.tif: not a sequence"), ("empty", "empty: holds no picture"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=why):
            frames.load(tmp_path / name)
    for count in (0, frames.MAX_FRAMES + 1):
        with pytest.raises(ValueError, match=f"frames: got {count}, expected 1 to 3600"):
            frames.load(tmp_path / "a.gif", count)
    monkeypatch.setattr(frames, "MAX_FRAMES", 3)
    with pytest.raises(ImageError, match=r"a\.gif: 4 frames, expected at most 3"):
        frames.load(tmp_path / "a.gif")
    assert len(frames.load(tmp_path / "a.gif", 3)) == 3


def test_a_frame_too_large_to_decode_is_refused(tmp_path, monkeypatch):
    stills(2, (30, 30))[0].save(tmp_path / "a.tif", save_all=True, append_images=stills(1, (90, 90)))
    monkeypatch.setattr(frames.images.upright, "__defaults__", (2000,))
    with pytest.raises(ImageError, match="90 x 90 pixels is more than"):
        frames.load(tmp_path / "a.tif")
