"""Samples whose modality switches: pictures, videos or sounds come in, words and one of the three go out.

Pictures and videos share the dataset's captions; a video is a slow pan over one picture. Sounds have captions of their own
(`data.sounds`). How a sample is written, the family says. Batches are numbered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkernels.data import images, sounds
from mmkernels.data.dataset import Dataset, Picture, view
from mmkernels.data.mixtures import QUESTIONS
from mmkernels.data.sequences import Batch, Sequences
from mmkernels.data.tokenizer import Tokenizer

FRAMES = 4
VERBS, ASK, AGAIN = ("draw", "film", "play"), "what is this?", "this"
_TEXT = 3  # beside the three modalities
# what comes in (None: nothing), what is asked for: (0, 1) is a picture to be filmed
KINDS = (*((m, _TEXT) for m in range(3)), *((None, m) for m in range(3)), (0, 1), (1, 0), (None, _TEXT))
_STREAMS = {"encoding": 40, "decoding": 41, "instructions": 42, "echoes": 43, "inputs": 44, "held_out": 45}


@dataclass(frozen=True)
class SwitchBatch(Batch):
    """A batch with one input of each kind a row (zeros where the row has none): images `[B, 1, 3, S, S]`, videos
    `[B, 1, F, 3, S, S]`, audios `[B, 1, L]`; labels -100 before the answer; `asked [B]` is the modality asked for, 3 for words.
    """

    videos: Tensor
    audios: Tensor
    labels: Tensor
    asked: Tensor


@dataclass(frozen=True)
class Writing:
    """`prompt(instruction, modalities that come in)` and `answer(words, modality or None)` give ids."""

    prompt: Callable[[str, list[int]], list[int]]
    answer: Callable[[str, int | None], list[int]]
    places: tuple[int, int, int]
    caption: str


class Switching(Sequences):
    """See the module; `writing` says how samples are written, with as many places as an input takes."""

    def __init__(
        self, dataset: Dataset, tokenizer: Tokenizer, size: int, *, seed: int, writing: Writing
    ) -> None:
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.writing = writing
        self.captions = (*dataset.captions, *sounds.CAPTIONS)

    def draw(self, rng: np.random.Generator, modality: int, caption: int, *, held_out: bool) -> NDArray:
        """One input: a picture `[S, S, 3]`, a video `[F, S, S, 3]`, a sound `[L]`."""
        if modality == 2:
            return sounds.draw(rng, caption - len(self.dataset.captions))
        pictures = (self.dataset.held_out if held_out else self.dataset.train)[caption]
        picture = pictures[int(rng.integers(len(pictures)))]
        if modality == 0:
            return view(picture, rng, self.size, held_out=held_out)
        return self._pan(picture, rng, held_out)

    def _pan(self, picture: Picture, rng: np.random.Generator, held_out: bool) -> NDArray[np.uint8]:
        whole = Image.fromarray(view(picture, rng, self.size * 5 // 4, held_out=held_out))
        steps = np.linspace(0, whole.width - self.size, FRAMES).round().astype(int)
        top = (whole.width - self.size) // 2
        return np.stack([np.asarray(whole)[top : top + self.size, x : x + self.size] for x in steps])

    def inputs(
        self,
        number: int,
        batch: int,
        modality: int,
        *,
        held_out: bool = False,
        captions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Inputs of one modality as the model reads them `[B, 1, ...]` and the numbers of their captions `[B]`."""
        rng = np.random.default_rng((self.seed, _STREAMS["inputs"], modality, int(held_out), number))
        numbers = (
            [self._caption(rng, modality) for _ in range(batch)] if captions is None else captions.tolist()
        )
        drawn = np.stack([self.draw(rng, modality, c, held_out=held_out) for c in numbers])
        tensor = torch.from_numpy(drawn) if modality == 2 else images.normalise(drawn)
        return tensor.unsqueeze(1), torch.tensor(numbers)

    def encoding(self, number: int, batch: int, *, held_out: bool = False) -> SwitchBatch:
        """An input of any kind, described."""
        rng = self._rng(_STREAMS["held_out" if held_out else "encoding"], number)
        return self._samples(rng, [(i % 3, _TEXT) for i in range(batch)], held_out, self.writing.caption)

    def decoding(self, number: int, batch: int) -> SwitchBatch:
        """Words alone that ask for a picture, a video or a sound."""
        return self._samples(self._rng(_STREAMS["decoding"], number), [(None, i % 3) for i in range(batch)])

    def instructions(self, number: int, batch: int) -> SwitchBatch:
        """All of `KINDS`, with equal chances."""
        rng = self._rng(_STREAMS["instructions"], number)
        return self._samples(rng, [KINDS[int(k)] for k in rng.integers(len(KINDS), size=batch)])

    def held_out(self, number: int, batch: int) -> SwitchBatch:
        """Pictures that training never draws, described."""
        return self._samples(self._rng(_STREAMS["held_out"], number), [(0, _TEXT)] * batch, True)

    def echoes(self, number: int, batch: int) -> SwitchBatch:
        """No input: where one would stand are its caption's own words, somewhere; and questions about words."""
        rng, rows = self._rng(_STREAMS["echoes"], number), []
        for i in range(batch):
            if i % 3 == 2:
                rows.append((*self._words(rng), _TEXT))
                continue
            caption = int(rng.integers(len(self.captions)))
            asked = (ASK, self.writing.caption)[int(rng.integers(2))]
            ids = self.writing.prompt(asked, [int(rng.integers(3))])
            rows.append(
                (
                    self._echo(rng, ids, caption),
                    caption,
                    self.writing.answer(self.captions[caption], None),
                    _TEXT,
                )
            )
        return self._collated(rows, [(None, caption) for _, caption, _, _ in rows], rng, False)

    def _echo(self, rng: np.random.Generator, ids: list[int], caption: int) -> list[int]:
        at = [n for n, token in enumerate(ids) if token in self.writing.places]
        words = self.tokenizer.encode(self.captions[caption])[: len(at)]
        start = at[0] + int(rng.integers(len(at) - len(words) + 1))
        blank = [self.tokenizer.end_of_text if n in at else token for n, token in enumerate(ids)]
        return [*blank[:start], *words, *blank[start + len(words) :]]

    def _caption(self, rng: np.random.Generator, modality: int) -> int:
        shown, all_ = len(self.dataset.captions), len(self.captions)
        return int(rng.integers(shown, all_) if modality == 2 else rng.integers(shown))

    def _words(self, rng: np.random.Generator) -> tuple[list[int], int, list[int]]:
        """Two captions, and which of them is first or last; or one to be said again."""
        pair, last = rng.choice(len(self.captions), 2, replace=False), int(rng.integers(2))
        told = f"{self.captions[pair[0]]}. {self.captions[pair[1]]}. {QUESTIONS[last]}"
        if rng.random() < 0.5:
            told = f"say {self.captions[pair[last]]}"
        answer = self.writing.answer(self.captions[pair[last]], None)
        return self.writing.prompt(told, []), int(pair[last]), answer

    def _samples(
        self,
        rng: np.random.Generator,
        kinds: list[tuple[int | None, int]],
        held_out: bool = False,
        instruction: str = ASK,
    ) -> SwitchBatch:
        rows, given = [], []
        for comes, asked in kinds:
            if comes is None and asked == _TEXT:
                prompt, caption, answer = self._words(rng)
            else:
                caption = self._caption(rng, asked if comes is None else comes)
                words = (
                    instruction
                    if asked == _TEXT
                    else f"{VERBS[asked]} {self.captions[caption] if comes is None else AGAIN}"
                )
                prompt = self.writing.prompt(words, [] if comes is None else [comes])
                answer = self.writing.answer(self.captions[caption], None if asked == _TEXT else asked)
            rows.append((prompt, caption, answer, asked))
            given.append((comes, caption))
        return self._collated(rows, given, rng, held_out)

    def _collated(
        self,
        rows: list[tuple[list[int], int, list[int], int]],
        given: list[tuple[int | None, int]],
        rng: np.random.Generator,
        held_out: bool,
    ) -> SwitchBatch:
        longest = max(len(p) + len(a) for p, _, a, _ in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad)
        labels = torch.full_like(ids, -100)
        for n, (prompt, _, answer, _) in enumerate(rows):
            ids[n, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[n, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        s, b = self.size, len(rows)
        inputs = (
            torch.zeros(b, 1, 3, s, s),
            torch.zeros(b, 1, FRAMES, 3, s, s),
            torch.zeros(b, 1, sounds.LENGTH),
        )
        for n, (modality, caption) in enumerate(given):
            if modality is not None:
                drawn = self.draw(rng, modality, caption, held_out=held_out)
                inputs[modality][n, 0] = (
                    torch.from_numpy(drawn) if modality == 2 else images.normalise(drawn.copy())
                )
        lengths = torch.tensor([(len(p), len(p) + len(a)) for p, _, a, _ in rows])
        mask = torch.arange(longest) < lengths[:, 1:]
        captions, asked = torch.tensor([c for _, c, _, _ in rows]), torch.tensor([a for *_, a in rows])
        return SwitchBatch(inputs[0], ids, mask, lengths, captions, inputs[1], inputs[2], labels, asked)
