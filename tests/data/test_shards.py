"""Shards come back as they were written; what is broken is skipped, counted and said, and beyond a limit ends the reading."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from mmkernels import data
from mmkernels.data import shards
from mmkernels.data.images import ImageError, decode


def pictures(count):
    rng = np.random.default_rng(0)
    return [
        (Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)), f"caption {i % 2}")
        for i in range(count)
    ]


def archive(path, *files):
    with tarfile.open(path, "w") as shard:
        for name, raw in files:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            shard.addfile(member, io.BytesIO(raw))
    return path


def png(image):
    raw = io.BytesIO()
    image.save(raw, "PNG")
    return raw.getvalue()


def test_what_is_written_comes_back(tmp_path):
    samples = pictures(5)
    paths = shards.write(samples, tmp_path / "a", per_shard=2)
    assert [p.name for p in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    reader = shards.Shards(paths)
    for _ in range(2):  # reading again counts again
        found = list(reader)
        assert [s.text for s in found] == [text for _, text in samples]
        assert all(np.array_equal(s.image, image) for s, (image, _) in zip(found, samples, strict=True))
        assert reader.report() == "5 samples read, 0 skipped"
    again = shards.write(samples, tmp_path / "b", per_shard=2)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_what_is_broken_is_skipped_counted_and_said(tmp_path):
    (good, text), *_ = pictures(1)
    raw = png(good)
    path = archive(
        tmp_path / "a.tar",
        ("0.png", raw), ("0.txt", text.encode()),
        ("1.txt", b"no picture"),
        ("2.png", raw), ("2.txt", b"  "),
        ("3.jpg", raw[:40]), ("3.txt", b"cut"),
        ("4.png", b"not a picture"), ("4.txt", b"other"),
        ("5.PNG", raw), ("5.json", b"{}"), ("5.txt", text.encode()),
    )  # fmt: skip
    reader = shards.Shards([path])
    assert [s.key for s in reader] == ["0", "5"]
    assert reader.skipped == {"without a picture": 1, "without a text": 1, "with an unreadable picture": 2}
    said = reader.report()
    assert (
        said.startswith("2 samples read, 4 skipped: 2 with an unreadable picture, 1 without a picture")
        and "a.tar: 1)" in said
    )
    assert len(list(shards.Shards([path], limit=4))) == 2
    with pytest.raises(
        ValueError, match=r"shards: 1 samples read, 4 skipped: .*; expected at most 3 skipped"
    ):
        list(shards.Shards([path], limit=3))


@pytest.mark.parametrize("kept", [0.3, 0.4, 0.5])
def test_a_truncated_shard_gives_what_came_before_its_end(tmp_path, kept):
    path = shards.write(pictures(6), tmp_path)[0]
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept) // 512 * 512 + 100])
    reader = shards.Shards([path, *shards.write(pictures(2), tmp_path / "whole")])
    found = list(reader)
    assert 2 <= len(found) < 8 and [s.text for s in found[-2:]] == [
        "caption 0",
        "caption 1",
    ]  # the next shard is read
    assert sum(reader.skipped.values()) >= 1 and "damaged" in reader.report()
    with pytest.raises(ValueError, match="truncated or damaged shards"):
        list(shards.Shards([path], limit=0))


def test_what_is_no_shard_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match="1 truncated or damaged shards"):
        list(shards.Shards([tmp_path / "a.tar"], limit=0))
    with pytest.raises(FileNotFoundError, match=r"b\.tar: no such shard"):
        shards.Shards([tmp_path / "b.tar"])
    with pytest.raises(FileNotFoundError, match="no such shard"):
        shards.build(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no such shard"):
        shards.build(tmp_path / "empty")
    with pytest.raises(ValueError, match="limit: got -1"):
        shards.Shards([tmp_path / "a.tar"], limit=-1)
    with pytest.raises(ImageError, match=r"x: 7\.png: not a picture"):
        decode(b"nothing", "x: 7.png")


def test_shards_are_a_dataset_by_name(tmp_path):
    shards.write(pictures(11), tmp_path)
    dataset = data.build(f"shards:{tmp_path}")
    assert dataset.captions == ("caption 0", "caption 1")
    assert [len(p) for p in dataset.train] == [4, 4] and [len(p) for p in dataset.held_out] == [2, 1]
    archive(tmp_path / "99999.tar", ("1.txt", b"alone"))
    data.build.cache_clear()
    with pytest.warns(UserWarning, match="11 samples read, 1 skipped: 1 without a picture"):
        data.build(f"shards:{tmp_path}")
