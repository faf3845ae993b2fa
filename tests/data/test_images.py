"""Pictures nobody vouches for: each is either read rightly or refused in one sentence that names the file."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmkernels.data import ImageError, images

RNG = np.random.default_rng(0)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, *, rows: int | None = None) -> bytes:
    """A small PNG file of a large 1-bit picture."""
    row = b"\0" * (1 + (width + 7) // 8)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(row * (height if rows is None else rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def corner(path) -> tuple[int, ...]:
    return images.load(path).getpixel((0, 0))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_lossless_rgb_comes_back_as_it_was(tmp_path, suffix):
    pixels = noise(7, 5, 3)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
    assert np.array_equal(np.asarray(images.load(tmp_path / f"a.{suffix}")), pixels)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), RED)
    image.putpixel((0, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = images.load(tmp_path / "a.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((9, 0)) == BLUE


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = corner(tmp_path / "a.jpg")
    assert red > 200
    assert green < 60
    assert blue < 60


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)).save(tmp_path / "a.png")
    assert corner(tmp_path / "a.png") == (0x80, 0x80, 0x80)


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 255, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "opaque.png")
    for name in ("rgba", "la", "p"):
        assert corner(tmp_path / f"{name}.png") == WHITE, name
    assert corner(tmp_path / "opaque.png") == RED


def test_one_bit_and_grey_become_rgb(tmp_path):
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert corner(tmp_path / "bit.png") == WHITE
    assert corner(tmp_path / "grey.png") == (7, 7, 7)


@pytest.mark.parametrize(("width", "height"), [(19_000, 19_000), (100_000, 5_000)])
def test_a_bomb_is_refused_from_its_header(tmp_path, width, height, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(width, height, rows=1))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"bomb\.png: .*(pixels|decompression bomb)"):
        images.load(path)


def test_the_cap_is_the_callers(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    images.load(tmp_path / "a.png", max_pixels=100)
    with pytest.raises(ImageError, match=r"a\.png: 10 x 10 pixels is more than the 99"):
        images.load(tmp_path / "a.png", max_pixels=99)


def test_animations_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=f"{name}: an animation of 3 frames"):
            images.load(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tiff", "ppm", "ico"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path, suffix):
    Image.new("RGB", (16, 16)).save(tmp_path / f"a.{suffix}")
    disguised = (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: not a picture"):
        images.load(disguised)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("kept", [0, 1, 20, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(ImageError, match=path.name):
        images.load(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_flipped_bits_end_in_a_picture_or_in_an_image_error(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(32, 32, 3)).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(100):
        broken = bytearray(whole)
        for at in RNG.integers(len(broken), size=4):
            broken[at] ^= 1 << int(RNG.integers(8))
        path.write_bytes(broken)
        with contextlib.suppress(ImageError):
            assert images.load(path).mode == "RGB"
            continue
        refused += 1
    assert refused or suffix == "jpg"  # a JPEG has no checksum


def test_no_such_file_and_folders(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match="no such picture"):
            images.load(path)


def test_a_thin_strip_is_cut_before_it_is_resized():
    strip = Image.new("RGB", (100_000, 1), RED)
    strip.putpixel((50_000, 0), GREEN)
    assert images.square(strip, 32).shape == (32, 32, 3)


def test_square_takes_the_centre():
    image = Image.new("RGB", (30, 10), RED)
    image.paste(BLUE, (10, 0, 20, 10))
    assert (images.square(image, 10) == BLUE).all()


def test_normalise_is_clips():
    pixels = noise(2, 4, 4, 3)
    ours = images.normalise(pixels)
    assert ours.shape == (2, 3, 4, 4)
    assert ours.is_contiguous()
    exact = (pixels / 255 - np.array(images.MEAN)) / np.array(images.STD)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1), exact, atol=1e-6)
