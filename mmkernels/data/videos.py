"""Short videos of real pictures, and questions that only their frames answer.

A video is two shots. A shot is a slow pan and zoom over one picture, so that its frames are overlapping cuts of it; the two
shots show pictures of different captions. The question asks what the video shows at first or at last, and the answer is that
shot's caption: it takes both the content of the frames and their order. Batches are numbered: batch `number` of a seed is
always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkernels.data import images
from mmkernels.data.dataset import Dataset, Picture, view
from mmkernels.data.sequences import Batch, Sequences
from mmkernels.data.tokenizer import Tokenizer

QUESTIONS = ("what is at first?", "what is at last?")
_VIDEOS, _HELD_OUT = range(100, 102)  # streams of random numbers, apart from those of sequences


@dataclass(frozen=True)
class VideoBatch(Batch):
    """A batch whose images are one video a row, `[B, 1, F, 3, S, S]`; prompt_ids and prompt_mask `[B, 1, L]` ask about it.

    The text is the visual tokens' places, the question, and the answer with its end of text; labels `[B, T]` are -100
    everywhere but there.
    """

    labels: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor


class Videos(Sequences):
    """Draws batches of videos of `frames` frames (two shots of half of them), `tokens_per_frame` places each."""

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        size: int,
        *,
        seed: int = 0,
        frames: int = 6,
        tokens_per_frame: int = 2,
    ) -> None:
        if frames < 2 or frames % 2:
            raise ValueError(f"frames: got {frames}, expected an even number of 2 or more")
        super().__init__(dataset, tokenizer, size, seed=seed)
        self.frames, self.places = frames, frames * tokens_per_frame

    def videos(self, number: int, batch: int) -> VideoBatch:
        """One video and one question a row."""
        return self._draw(self._rng(_VIDEOS, number), batch, held_out=False)

    def held_out(self, number: int, batch: int) -> VideoBatch:
        """Videos of cuts that training never draws."""
        return self._draw(self._rng(_HELD_OUT, number), batch, held_out=True)

    def _draw(self, rng: np.random.Generator, batch: int, *, held_out: bool) -> VideoBatch:
        pixels, texts, answers = [], [], []
        for _ in range(batch):
            captions = rng.choice(len(self.dataset.captions), size=2, replace=False)
            pixels.append(np.concatenate([self._shot(rng, int(c), held_out=held_out) for c in captions]))
            asked = int(rng.integers(2))
            answers.append(int(captions[asked]))
            texts.append((QUESTIONS[asked], self.dataset.captions[answers[-1]]))
        return self._batch(images.normalise(np.stack(pixels)).unsqueeze(1), texts, torch.tensor(answers))

    def _shot(self, rng: np.random.Generator, caption: int, *, held_out: bool) -> NDArray[np.uint8]:
        """uint8 `[F / 2, S, S, 3]`: cuts of a view that shrink towards one of its corners."""
        pictures = (self.dataset.held_out if held_out else self.dataset.train)[caption]
        picture: Picture = pictures[int(rng.integers(len(pictures)))]
        whole = Image.fromarray(view(picture, rng, 2 * self.size, held_out=held_out))
        count, corner, least = self.frames // 2, rng.integers(2, size=2), rng.uniform(0.75, 0.95)
        cuts = []
        for t in range(count):
            side = whole.width * (1 - (1 - least) * t / max(count - 1, 1))
            left, top = (whole.width - side) * corner
            box = (left, top, left + side, top + side)
            cuts.append(np.asarray(whole.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)))
        return np.stack(cuts[:: rng.choice((-1, 1))])  # zooms in, or out

    def _batch(self, frames: Tensor, texts: list[tuple[str, str]], captions: Tensor) -> VideoBatch:
        t = self.tokenizer
        questions = [t.encode(question) for question, _ in texts]
        replies = [[*t.encode(f" {answer}"), t.end_of_text] for _, answer in texts]
        heads = [[t.image] * self.places + question for question in questions]
        ids, mask = _padded([head + reply for head, reply in zip(heads, replies, strict=True)], t.pad)
        answers = torch.tensor([(len(h), len(h) + len(r)) for h, r in zip(heads, replies, strict=True)])
        place = torch.arange(ids.shape[1])
        replied = (place >= answers[:, :1]) & (place < answers[:, 1:])
        prompts = (rows.unsqueeze(1) for rows in _padded(questions, t.pad))
        return VideoBatch(frames, ids, mask, answers, captions, torch.where(replied, ids, -100), *prompts)


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
