"""Scenes with known boxes: real objects laid over real photographs, what they are called, and where they are, as text.

A scene is a canvas cut out of a photograph that shows no object, and pictures of a dataset pasted on it at random places and
in random sizes, none over another. Scenes ask for a caption, or for the box of one of several objects. Batches are numbered:
batch `number` of a seed is always the same. Held-out scenes have other cuts of the canvases and held-out pictures.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkernels.data import images
from mmkernels.data.dataset import Dataset, Picture, shrink, view
from mmkernels.data.sequences import Batch, Sequences
from mmkernels.data.tokenizer import Tokenizer

QUESTION = "where is {}?"
OBJECTS = 2  # in a scene that is asked about
SIDES = (0.3, 0.5)  # of an object, as shares of the canvas
_CANVASES = ("brick", "camera", "grass", "gravel", "ihc", "moon")  # of scikit-image
_CAPTIONS, _BOXES, _ECHOES, _SCENES, _HELD_CAPTIONS, _HELD_BOXES, _GUESSES = range(
    40, 47
)  # streams of random numbers
_GUESSED = 512  # scenes of the mean box
_NUMBER = r"(\d{3})"
_BOX = re.compile(",".join([_NUMBER] * 4))
_LIST = re.compile(r"\[\[([\d,;]*)\]\]")

Box = tuple[float, float, float, float]
_Row = tuple[
    list[int], list[int], int, Box
]  # head, answer, the caption's number and box of the object it is about


def box_text(*boxes: Sequence[float]) -> str:
    """Boxes (x0, y0, x1, y1) in shares of the picture as CogVLM writes them: `[[x0,y0,x1,y1;...]]`, three digits a side.

    Thousandths are rounded down, at most 999. **Raises** ValueError for boxes that leave the picture, and for none.
    """
    if not boxes:
        raise ValueError("boxes: got none, expected at least one")
    for x0, y0, x1, y1 in boxes:
        if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
            raise ValueError(
                f"box: got {(x0, y0, x1, y1)}, expected 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1"
            )
    written = (",".join(f"{min(int(1000 * side), 999):03d}" for side in box) for box in boxes)
    return f"[[{';'.join(written)}]]"


def boxes_in(text: str) -> list[Box]:
    """The boxes that a text writes, in shares of the picture; what is no box of four three-digit numbers is passed over."""
    parts = (part for found in _LIST.findall(text) for part in found.split(";"))
    matches = (_BOX.fullmatch(part) for part in parts)
    return [tuple(int(n) / 1000 for n in match.groups()) for match in matches if match]  # type: ignore[misc]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes `[..., 4]` (x0, y0, x1, y1); boxes without area, or turned inside out, give 0."""
    for name, boxes in {"a": a, "b": b}.items():
        if not boxes.dim() or boxes.shape[-1] != 4:
            raise ValueError(f"{name}: got shape {list(boxes.shape)}, expected [..., 4]")
    inner = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    both = inner.clamp(min=0).prod(-1)
    areas = ((t[..., 2:] - t[..., :2]).clamp(min=0).prod(-1) for t in (a, b))
    union = sum(areas, -both)
    return torch.where(union > 0, both / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


@dataclass(frozen=True)
class Scene:
    """pixels uint8 `[S, S, 3]`, the captions' numbers of its objects, and their boxes in shares of the canvas."""

    pixels: NDArray[np.uint8]
    captions: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class SceneBatch(Batch):
    """A batch of one scene a row, images `[B, 1, 3, S, S]`. The text is the beginning, the picture's places, a question where
    one is asked, and the answer with its end of text; labels `[B, T]` are -100 everywhere but there. boxes `[B, 4]` are those
    of the object that the row is about.
    """

    labels: Tensor
    boxes: Tensor


class Grounding(Sequences):
    """Draws batches of scenes; a picture takes `places` places of the text, behind one token that begins every text."""

    def __init__(
        self, dataset: Dataset, tokenizer: Tokenizer, size: int, *, seed: int = 0, places: int = 1
    ) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.places, self._canvases = places, canvases()

    def captions(self, number: int, batch: int) -> SceneBatch:
        """Scenes of one object, and its caption."""
        return self._captions(self._rng(_CAPTIONS, number), batch, held_out=False)

    def boxes(self, number: int, batch: int) -> SceneBatch:
        """Scenes of two objects, the question where one of them is, and its box."""
        return self._boxes(self._rng(_BOXES, number), batch, held_out=False)

    def held_out(self, number: int, batch: int) -> SceneBatch:
        """As `captions`, of scenes that training never draws."""
        return self._captions(self._rng(_HELD_CAPTIONS, number), batch, held_out=True)

    def held_out_boxes(self, number: int, batch: int) -> SceneBatch:
        """As `boxes`, of scenes that training never draws."""
        return self._boxes(self._rng(_HELD_BOXES, number), batch, held_out=True)

    def scenes(self, number: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures `[B, 3, S, S]`, their objects' captions `[B, 2]` and boxes `[B, 2, 4]`."""
        rng = self._rng(_SCENES, number)
        drawn = [self.scene(rng) for _ in range(batch)]
        pixels = images.normalise(np.stack([scene.pixels for scene in drawn]))
        return pixels, torch.tensor([s.captions for s in drawn]), torch.tensor([s.boxes for s in drawn])

    def echoes(self, number: int, batch: int) -> tuple[SceneBatch, Tensor, Tensor]:
        """Texts about scenes that are not drawn: half of the rows ask for a box, half want the only object's caption.

        Beside the batch the captions `[B, 2]` and boxes `[B, 2, 4]` of all objects; the box of one that is not there is empty.
        """
        rng, rows = self._rng(_ECHOES, number), []
        shown = torch.zeros(batch, OBJECTS, dtype=torch.int64), torch.zeros(batch, OBJECTS, 4)
        for row in range(batch):
            count = 1 + int(rng.integers(OBJECTS))
            captions = [int(c) for c in rng.choice(len(self.dataset.captions), size=count, replace=False)]
            boxes = self._placed(rng, count)
            shown[0][row, :count], shown[1][row, :count] = torch.tensor(captions), torch.tensor(boxes)
            asked = int(rng.integers(count))
            rows.append(self._row(captions[asked], boxes[asked], count > 1))
        return self._batch(torch.zeros(batch, 0, 3, self.size, self.size), rows), *shown

    def mean_box(self) -> Tensor:
        """`[4]` the mean of the boxes of many scenes: the best guess of those who do not look."""
        rng = self._rng(_GUESSES, 0)
        return torch.tensor([box for _ in range(_GUESSED) for box in self._placed(rng, OBJECTS)]).mean(0)

    def scene(self, rng: np.random.Generator, count: int = OBJECTS, *, held_out: bool = False) -> Scene:
        """A canvas with `count` objects of different captions, no one over another."""
        canvas = self._canvases[int(rng.integers(len(self._canvases)))]
        picture = Image.fromarray(view(canvas, rng, self.size, held_out=held_out))
        boxes, captions = self._placed(rng, count), []
        for box in boxes:
            pixels, caption = self.dataset.draw(rng, self.size, held_out=held_out)
            while caption in captions:
                pixels, caption = self.dataset.draw(rng, self.size, held_out=held_out)
            captions.append(caption)
            x0, y0, x1, y1 = (round(side * self.size) for side in box)
            object_ = Image.fromarray(pixels).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
            picture.paste(object_, (x0, y0))
        return Scene(np.asarray(picture), tuple(captions), tuple(boxes))

    def _placed(self, rng: np.random.Generator, count: int) -> list[Box]:
        """Boxes in shares of the canvas, whole pixels, drawn again until they are apart."""
        low, high = (round(side * self.size) for side in SIDES)
        while True:
            sides = rng.integers(low, high + 1, size=(count, 2))
            corners = rng.integers(0, self.size - sides + 1)
            boxes = np.concatenate([corners, corners + sides], 1)
            if not any(_touch(boxes[i], boxes[j]) for i in range(count) for j in range(i)):
                return [tuple(box) for box in (boxes / self.size).tolist()]

    def _row(self, caption: int, box: Box, where: bool) -> _Row:
        """The places, then a question and its answer: where something is, or what it is, which needs no question."""
        t, name = self.tokenizer, self.dataset.captions[caption]
        question = t.encode(QUESTION.format(name)) if where else []
        answer = t.encode(box_text(box) if where else name)
        head = [t.end_of_text, *[t.image] * self.places, *question]
        return head, [*answer, t.end_of_text], caption, box

    def _captions(self, rng: np.random.Generator, batch: int, *, held_out: bool) -> SceneBatch:
        return self._draw(rng, batch, 1, held_out=held_out)

    def _boxes(self, rng: np.random.Generator, batch: int, *, held_out: bool) -> SceneBatch:
        return self._draw(rng, batch, OBJECTS, held_out=held_out)

    def _draw(self, rng: np.random.Generator, batch: int, count: int, *, held_out: bool) -> SceneBatch:
        pixels, rows = [], []
        for _ in range(batch):
            scene = self.scene(rng, count, held_out=held_out)
            pixels.append(scene.pixels)
            asked = int(rng.integers(count))
            rows.append(self._row(scene.captions[asked], scene.boxes[asked], count > 1))
        return self._batch(images.normalise(np.stack(pixels)).unsqueeze(1), rows)

    def _batch(self, pixels: Tensor, rows: list[_Row]) -> SceneBatch:
        longest = max(len(head) + len(answer) for head, answer, _, _ in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad)
        for n, (head, answer, _, _) in enumerate(rows):
            ids[n, : len(head) + len(answer)] = torch.tensor(head + answer)
        answers = torch.tensor([(len(head), len(head) + len(answer)) for head, answer, _, _ in rows])
        place = torch.arange(longest)
        replied = (place >= answers[:, :1]) & (place < answers[:, 1:])
        captions, boxes = torch.tensor([row[2] for row in rows]), torch.tensor([row[3] for row in rows])
        mask = place < answers[:, 1:]
        return SceneBatch(pixels, ids, mask, answers, captions, torch.where(replied, ids, -100), boxes)


def _touch(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    return bool((np.maximum(a[:2], b[:2]) < np.minimum(a[2:], b[2:])).all())


def texts(dataset: Dataset, size: int) -> list[str]:
    """What scenes of `size` pixels are told with, for a tokenizer: every caption, question and side of a box."""
    questions = [QUESTION.format(caption) for caption in dataset.captions]
    sides = [box_text((at, at, at, at)) for at in (pixel / size for pixel in range(size + 1))]
    return [*dataset.captions, *questions, *sides]


@functools.cache
def canvases() -> tuple[Picture, ...]:
    """Photographs of scikit-image that no dataset has captions for. **Raises** ImportError without it."""
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            'scenes need the photographs of scikit-image: pip install "mmkernels[train]"'
        ) from error
    folder = skimage.data.data_dir
    opened = (Image.open(f"{folder}/{name}.png").convert("RGB") for name in _CANVASES)
    return tuple(Picture(shrink(photograph, 160), 0, flip=True) for photograph in opened)
