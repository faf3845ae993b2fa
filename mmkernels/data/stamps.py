"""Tux Paint's stamps: drawings and photographs, each with a line of English, where the Debian package has put them.

The files are under the GPL and are read where they are installed, never copied. Most captions have one picture only, so a
held-out view is another cut of a known picture.
"""

from __future__ import annotations

from pathlib import Path

from mmkernels.data import images
from mmkernels.data.dataset import Dataset, Picture, shrink

ROOT = Path("/usr/share/tuxpaint/stamps")
_LONGEST = 40  # letters; longer ones are stories
_INSTALL = "apt-get install tuxpaint-stamps-default"


def build(root: Path = ROOT) -> Dataset:
    """All pictures under `root` that have a text beside them, by caption."""
    if not root.is_dir():
        raise FileNotFoundError(f"--data stamps reads {root}, which is not there: {_INSTALL}")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        caption = _caption(text) if text.is_file() else ""
        if caption:
            found.setdefault(caption, []).append(path)
    if not found:
        raise FileNotFoundError(
            f"--data stamps found no picture with a text beside it under {root}: {_INSTALL}"
        )
    pictures = tuple(
        tuple(_picture(path, number) for path in paths) for number, paths in enumerate(found.values())
    )
    return Dataset("stamps", tuple(found), train=pictures, held_out=pictures)


def _caption(text: Path) -> str:
    """The first line is the English one; "" when it is too long."""
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
    caption = lines[0].strip().rstrip(".").lower() if lines else ""
    return caption if len(caption) <= _LONGEST else ""


def _picture(path: Path, caption: int) -> Picture:
    return Picture(shrink(images.load(path), 64), caption, zoom=(0.8, 0.95), flip=True)
