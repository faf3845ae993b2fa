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
from mmkernels.data.tokenizer import Tokenizer

QUESTIONS = ("what is at first?", "what is at last?")
_TRAIN, _HELD_OUT = range(100, 102)  # streams of random numbers, apart from those of sequences


@dataclass(frozen=True)
class VideoBatch:
    """images `[B, 1, F, 3, S, S]`; prompt_ids and prompt_mask `[B, 1, L]`; input_ids, attention_mask and labels `[B, T]`.

    The text is the visual tokens' places, the question, and the answer with its end of text, at positions `answers[b, 0]` to
    `answers[b, 1] - 1`: they alone are labelled. `captions[b]` is the answer's number, `others[b]` the other shot's.
    """

    images: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    answers: Tensor
    captions: Tensor
    others: Tensor


class Videos:
    """Draws batches of videos of `frames` frames (two shots of half of them), `tokens_per_frame` places each."""

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        size: int,
        *,
        frames: int = 6,
        tokens_per_frame: int = 2,
        seed: int = 0,
    ) -> None:
        if frames < 2 or frames % 2:
            raise ValueError(f"frames: got {frames}, expected an even number of 2 or more")
        self.dataset, self.tokenizer, self.size, self.seed = dataset, tokenizer, size, seed
        self.frames, self.places = frames, frames * tokens_per_frame

    def batch(self, number: int, size: int, *, held_out: bool = False) -> VideoBatch:
        """`size` videos, each with one question."""
        rng = np.random.default_rng((self.seed, _HELD_OUT if held_out else _TRAIN, number))
        pixels, texts, shown = [], [], []
        for _ in range(size):
            captions = rng.choice(len(self.dataset.captions), size=2, replace=False)
            shots = [self._shot(rng, int(caption), held_out=held_out) for caption in captions]
            asked = int(rng.integers(2))
            pixels.append(np.concatenate(shots))
            texts.append((QUESTIONS[asked], self.dataset.captions[captions[asked]]))
            shown.append((int(captions[asked]), int(captions[1 - asked])))
        frames = images.normalise(np.stack(pixels)).unsqueeze(1)
        return self._collate(frames, texts, torch.tensor(shown))

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

    def _collate(self, frames: Tensor, texts: list[tuple[str, str]], shown: Tensor) -> VideoBatch:
        t = self.tokenizer
        questions = [t.encode(question) for question, _ in texts]
        replies = [[*t.encode(f" {answer}"), t.end_of_text] for _, answer in texts]
        heads = [[t.image] * self.places + question for question in questions]
        ids, mask = _padded([head + reply for head, reply in zip(heads, replies, strict=True)], t.pad)
        answers = torch.tensor([(len(h), len(h) + len(r)) for h, r in zip(heads, replies, strict=True)])
        place = torch.arange(ids.shape[1])
        replied = (place >= answers[:, :1]) & (place < answers[:, 1:])
        prompts, prompt_mask = _padded(questions, t.pad)
        return VideoBatch(
            frames, prompts.unsqueeze(1), prompt_mask.unsqueeze(1), ids, mask, torch.where(replied, ids, -100), answers,
            shown[:, 0], shown[:, 1],
        )  # fmt: skip


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
