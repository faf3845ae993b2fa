"""Datasets as webdataset shards: tar files in which `0007.png` and `0007.txt` are one sample.

Shards are read in order and never trusted: a sample whose picture or text is missing or unreadable is skipped, and so is what a
truncated shard has lost; both are counted and said, and beyond a limit they end the reading.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmkernels.data import images
from mmkernels.data.dataset import Dataset, Picture, shrink

_PICTURES, _TEXT = (".png", ".jpg", ".jpeg", ".webp"), ".txt"
_LARGEST = 64 * 1024 * 1024  # bytes of one file in a shard
_HELD_OUT = 5  # every fifth picture of a caption


class Sample(NamedTuple):
    """A sample's key, its picture, upright and RGB, and its text."""

    key: str
    image: Image.Image
    text: str


class Shards:
    """Reads shards; `skipped` counts what was not read, by reason, and `report()` says it in a sentence.

    `limit` is how many samples, and lost ends of shards, may be skipped before reading ends with a ValueError.
    """

    def __init__(self, paths: Iterable[str | Path], *, limit: int = 100) -> None:
        self.paths, self.limit = [Path(path) for path in paths], limit
        missing = [path for path in self.paths if not path.is_file()]
        if missing or not self.paths:
            raise FileNotFoundError(f"{missing[0] if missing else 'shards'}: no such shard")
        if limit < 0:
            raise ValueError(f"limit: got {limit}, expected 0 or more")
        self.read, self.skipped, self._first = 0, Counter[str](), ""

    def __iter__(self) -> Iterator[Sample]:
        """Every sample once. **Raises** ValueError when more than `limit` are skipped."""
        self.read, self.skipped, self._first = 0, Counter[str](), ""
        for path in self.paths:
            for key, files in self._groups(path):
                sample = self._sample(path, key, files)
                if sample is not None:
                    self.read += 1
                    yield sample

    def report(self) -> str:
        """What was read and what was not."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        first = f" (first: {self._first})" if self._first else ""
        return f"{self.read} samples read, {sum(self.skipped.values())} skipped{': ' if reasons else ''}{reasons}{first}"

    def _groups(self, path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Files that follow each other and share the name up to its first dot, by suffix."""
        key, files = "", dict[str, bytes]()
        try:
            with tarfile.open(path, "r|") as shard:
                for member in shard:
                    if not member.isfile():
                        continue
                    name, dot, suffix = Path(member.name).name.partition(".")
                    if name != key and files:
                        yield key, files
                        files = {}
                    key = name
                    files[f"{dot}{suffix}".lower()] = self._bytes(shard, member)
        except (tarfile.TarError, EOFError, OSError) as error:
            self._skip("truncated or damaged shards", f"{path}: {error}")
            return  # the group that was being read may lack its end
        whole = _ends(path)
        if files and (whole or (_TEXT in files and any(suffix in files for suffix in _PICTURES))):
            yield key, files
        if not whole:
            self._skip("truncated or damaged shards", f"{path}: it has no end")

    @staticmethod
    def _bytes(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        file = shard.extractfile(member) if member.size <= _LARGEST else None
        raw = b"" if file is None else file.read()
        if file is not None and len(raw) < member.size:
            raise EOFError(f"{member.name} ends after {len(raw)} of {member.size} bytes")
        return raw

    def _sample(self, path: Path, key: str, files: dict[str, bytes]) -> Sample | None:
        picture = next((suffix for suffix in _PICTURES if suffix in files), None)
        if picture is None:
            return self._skip("without a picture", f"{path}: {key}")
        if not files.get(_TEXT, b"").strip():
            return self._skip("without a text", f"{path}: {key}")
        try:
            image = images.decode(files[picture], f"{path}: {key}{picture}")
        except images.ImageError as error:
            return self._skip("with an unreadable picture", str(error))
        return Sample(key, image, files[_TEXT].decode("utf-8", "replace").strip())

    def _skip(self, reason: str, what: str) -> None:
        self.skipped[reason] += 1
        self._first = self._first or what
        if sum(self.skipped.values()) > self.limit:
            raise ValueError(f"shards: {self.report()}; expected at most {self.limit} skipped")


def _ends(path: Path) -> bool:
    """Whether a shard ends as tar files do, with two empty blocks: reading stops at a cut-off header without a word."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read() == bytes(1024)


def write(samples: Iterable[tuple[Image.Image, str]], folder: Path, *, per_shard: int = 1000) -> list[Path]:
    """Writes pictures (as PNG) with their texts as shards `00000.tar`, ...; the same bytes for the same samples."""
    if per_shard < 1:
        raise ValueError(f"per_shard: got {per_shard}, expected 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    shard: tarfile.TarFile | None = None
    for number, (image, text) in enumerate(samples):
        if number % per_shard == 0:
            if shard is not None:
                shard.close()
            paths.append(folder / f"{number // per_shard:05d}.tar")
            shard = tarfile.open(paths[-1], "w")  # noqa: SIM115
        assert shard is not None
        picture = io.BytesIO()
        image.save(picture, "PNG")
        for suffix, raw in ((".png", picture.getvalue()), (_TEXT, text.encode())):
            member = tarfile.TarInfo(f"{number:08d}{suffix}")
            member.size = len(raw)
            shard.addfile(member, io.BytesIO(raw))
    if shard is not None:
        shard.close()
    return paths


def build(folder: Path, *, side: int = 96, limit: int = 100) -> tuple[Dataset, str]:
    """The dataset that the shards of a folder hold, by their texts, and what was read of it.

    Every fifth picture of a caption is held out, and of a caption with fewer than five other cuts of the same.
    **Raises** FileNotFoundError for a folder without shards; ValueError when too much is skipped or nothing is left.
    """
    shards = Shards(sorted(folder.glob("*.tar")) if folder.is_dir() else [folder], limit=limit)
    found: dict[str, list[np.ndarray]] = {}
    for sample in shards:
        found.setdefault(sample.text, []).append(shrink(sample.image, side))
    if not found:
        raise ValueError(f"{folder}: no sample is left; {shards.report()}")
    train, held_out = [], []
    for number, pixels in enumerate(found.values()):
        pictures = [Picture(p, number, zoom=(0.8, 0.95)) for p in pixels]
        apart = len(pictures) >= _HELD_OUT
        train.append(tuple(p for i, p in enumerate(pictures) if i % _HELD_OUT or not apart))
        held_out.append(tuple(pictures[::_HELD_OUT]) if apart else tuple(pictures))
    return Dataset(str(folder), tuple(found), tuple(train), tuple(held_out)), shards.report()
