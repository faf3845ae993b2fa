"""Pictures of many sizes with what is to be said of them, as a LLaVA is shown them: photographs, and pages to be read.

Half of the rows are photographs and scans of a dataset, cut to a random size and aspect, half are pages (`data.pages`). What a
picture holds is known for every patch of every view: a tower that starts from nothing can be taught to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkernels.data import images, scenes
from mmkernels.data.dataset import Dataset
from mmkernels.data.scenes import SLOTS, Cutting, Scenes
from mmkernels.data.sequences import Batch
from mmkernels.data.slicing import Plan
from mmkernels.data.tokenizer import Tokenizer
from mmkernels.data.views import maps, plan_of, views

_PAIRS, _INSTRUCTIONS, _SHOWN, _ECHOES, _OUT, _PAGES_OUT = range(60, 66)  # streams of random numbers


@dataclass(frozen=True)
class Sight:
    """How a model looks: `data.views`' aspect at `size` pixels, patches of `patch`; `pinpoints` with "anyres"."""

    aspect: str
    size: int
    patch: int
    pinpoints: tuple[tuple[int, int], ...] = ()
    rounding: str = "llava"

    def plan(self, width: int, height: int) -> Plan | None:
        if self.aspect != "anyres":
            return None
        return plan_of(width, height, self.pinpoints, self.size, self.patch, self.rounding)

    def see(self, image: Image.Image) -> tuple[NDArray[np.uint8], Plan | None]:
        """A picture's views `[N, S, S, 3]` and the plan behind them."""
        plan = self.plan(*image.size)
        return views(image, self.aspect, self.size, plan), plan


@dataclass(frozen=True)
class ReadingBatch(Batch):
    """A picture a row: images `[B, N, 3, S, S]`, its views first, zeros behind them; `plans` say how many, None: one.

    labels `[B, T]` are -100 but at the answer. kinds `[V, 2]` says for every place of the batch what stands there (`Readings`).
    """

    labels: Tensor
    plans: tuple[Plan, ...] | None
    kinds: Tensor


class Readings(Scenes):
    """Draws batches for a way to look. `ask(question)` writes a question up to its answer, with the image token."""

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        sight: Sight,
        *,
        ask: Callable[[str], list[int]],
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, tokenizer, sight.size, seed=seed)
        self.sight, self.ask = sight, ask

    def at(self, size: int) -> Readings:
        """The same with views of another size."""
        sight = replace(self.sight, size=size)
        return type(self)(self._photographs, self.tokenizer, sight, ask=self.ask, seed=self.seed)

    def pairs(self, number: int, batch: int) -> ReadingBatch:
        """Pictures and what is said of them, nothing asked."""
        return self._batch(self._rows(self._rng(_PAIRS, number), batch), plain=True)

    def instructions(self, number: int, batch: int) -> ReadingBatch:
        """Questions about pictures and their answers."""
        return self._batch(self._rows(self._rng(_INSTRUCTIONS, number), batch))

    def held_out(self, number: int, batch: int) -> ReadingBatch:
        """As `instructions`, of photographs and pages that training never draws."""
        return self._batch(self._rows(self._rng(_OUT, number), batch, held_out=True))

    def held_out_pages(
        self, number: int, batch: int, size: tuple[int, int] | None = None, *, sliced: bool = True
    ) -> ReadingBatch:
        """Pages alone, of a given size or of many; without slices only the whole picture is shown."""
        rng = self._rng(_PAGES_OUT, number)
        return self._batch([self._page(rng, size=size) for _ in range(batch)], sliced=sliced)

    def shown(self, number: int, batch: int) -> tuple[Tensor, Tensor]:
        """Views `[N, 3, S, S]` of pictures and of pages full of digits, and what their patches hold `[N, P, 2]`."""
        rows = self._rows(self._rng(_SHOWN, number), batch, full=True)
        pixels = np.concatenate([self._views(row) for row in rows])
        return images.normalise(pixels), torch.from_numpy(np.concatenate([self._kinds(row) for row in rows]))

    def echoes(self, number: int, batch: int) -> ReadingBatch:
        """Texts about pictures that are not drawn, but for their `kinds`; every second row is asked nothing."""
        rows = self._rows(self._rng(_ECHOES, number), batch)
        return self._batch(rows, plain=number % 2 == 0, drawn=False)

    def _plan(self, row: Cutting) -> Plan | None:
        return self.sight.plan(row.pixels.shape[1], row.pixels.shape[0])

    def _views(self, row: Cutting) -> NDArray[np.uint8]:
        return self.sight.see(Image.fromarray(row.pixels))[0]

    def _kinds(self, row: Cutting) -> NDArray[np.int64]:
        """`[N, P, 2]` what the patches of a row's views hold."""
        s, (height, width, _) = self.sight, row.pixels.shape
        affine, grid = maps(width, height, s.aspect, s.size, self._plan(row)), s.size // s.patch
        found = [self.holds(row, (grid, grid), partial(_seen_at, m, s.patch)) for m in affine]
        return np.stack(found).reshape(len(affine), -1, SLOTS)

    def _placed(self, row: Cutting, sliced: bool) -> NDArray[np.int64]:
        """`[R, 2]` what the row's places hold: newlines hold nothing."""
        kinds, plan = self._kinds(row), self._plan(row)
        if plan is None:
            return kinds.reshape(-1, SLOTS)
        flat = np.concatenate([kinds.reshape(-1, SLOTS), np.full((1, SLOTS), self.nothing)])
        return flat[plan.layout] if sliced else np.concatenate([kinds[0], flat[-1:]])

    def _batch(
        self, rows: Sequence[Cutting], *, plain: bool = False, drawn: bool = True, sliced: bool = True
    ) -> ReadingBatch:
        plans = [plan for row in rows if sliced and (plan := self._plan(row)) is not None]
        kinds = [self._placed(row, sliced) for row in rows]
        t = self.tokenizer
        heads = [[t.image] if plain else self.ask(row.question) for row in rows]
        end = t.end_of_chunk if plain else t.end_of_text
        spans = [_widened(head, t.image, len(k)) for head, k in zip(heads, kinds, strict=True)]
        said = [t.encode(f" {self.said(row)}") for row in rows]
        ids = [[*head, *answer, end] for head, answer in zip(spans, said, strict=True)]
        longest = max(map(len, ids))
        text = torch.tensor([row + [t.pad] * (longest - len(row)) for row in ids])
        answers = torch.tensor([(len(head), len(row)) for head, row in zip(spans, ids, strict=True)])
        place = torch.arange(longest)
        answer = (place >= answers[:, :1]) & (place < answers[:, 1:])
        return ReadingBatch(
            self._images(rows, drawn, sliced), text, place < answers[:, 1:], answers,
            torch.tensor([row.caption for row in rows]), torch.where(answer, text, -100),
            tuple(plans) if plans else None, torch.from_numpy(np.concatenate(kinds)),
        )  # fmt: skip

    def _images(self, rows: Sequence[Cutting], drawn: bool, sliced: bool) -> Tensor:
        if not drawn:
            return torch.zeros(len(rows), 0, 3, self.size, self.size)
        shown = [images.normalise(self._views(row)) for row in rows]
        shown = shown if sliced else [view[:1] for view in shown]
        out = torch.zeros(len(rows), max(map(len, shown)), *shown[0].shape[1:])
        for row, view in zip(out, shown, strict=True):
            row[: len(view)] = view
        return out


def _seen_at(affine: Sequence[float], patch: int, x: float, y: float) -> tuple[float, float]:
    """Where a point of the picture falls in a view, in patches."""
    a, b, c, d = affine
    return (a * x + b) / patch, (c * y + d) / patch


def _widened(ids: list[int], image: int, places: int) -> list[int]:
    """The one image token of a text becomes its places."""
    return [token for i in ids for token in ([image] * places if i == image else [i])]


def texts(dataset: Dataset, prompts: Sequence[str]) -> list[str]:
    """What is said of pictures, for a tokenizer: captions and digits, as answers, and what is written around questions."""
    return [*scenes.texts(dataset), *prompts]


class Photographs(Readings):
    """The same without pages: a single small view cannot read them."""

    def _rows(
        self, rng: np.random.Generator, batch: int, *, held_out: bool = False, full: bool = False
    ) -> list[Cutting]:
        return [self._photograph(rng, held_out=held_out) for _ in range(batch)]
