"""Makes a room that works, differentiates, compiles and is tested at once: `python tools/room.py foo [ops]`.

It scales the columns of a matrix; put your mathematics in its place. Templates: tools/room/.
"""

from __future__ import annotations

import sys
from pathlib import Path

TEMPLATES = Path(__file__).with_suffix("")
PACKAGE = Path(__file__).resolve().parents[1] / "mmkernels"
FLOORS = ("primitives", "ops")


def make_room(name: str, floor: str) -> Path:
    folder = PACKAGE / floor / name
    if floor not in FLOORS:
        raise SystemExit(f"FLOOR: got {floor!r}, expected one of {', '.join(FLOORS)}")
    if not name.isidentifier() or not name.islower() or name.startswith("_"):
        raise SystemExit(f"NAME: got {name!r}, expected a lower-case Python name, such as grouped_linear")
    if any((PACKAGE / other / name).exists() for other in FLOORS):
        raise SystemExit(f"NAME: there is a room {name} already")
    folder.mkdir()
    for template in sorted(TEMPLATES.glob("*.in")):
        text = template.read_text().replace("__FLOOR__", floor).replace("__NAME__", name)
        (folder / template.stem).write_text(text)
    with (PACKAGE / "__init__.py").open("a") as package:
        package.write(f"from mmkernels.{floor}.{name} import {name} as {name}\n")
    return folder


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or not sys.argv[1]:
        raise SystemExit("usage: make room NAME=foo [FLOOR=ops]")
    made = make_room(sys.argv[1], *(sys.argv[2:] or ["ops"]))
    print(
        f"{made.relative_to(PACKAGE.parent)}: write reference.py, then op.py and cases.py; `make test` covers it already"
    )
