"""From a checkpoint and some pictures to words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkernels import models
from mmkernels.data import Tokenizer, images, store
from mmkernels.data.pairs import INSTRUCTIONS
from mmkernels.data.sequences import MAX_IMAGES
from mmkernels.data.tokenizer import IMAGE
from mmkernels.models import Lavin, LlamaVid, MultimodalModel, weights
from mmkernels.models.qformer import Instruction

Picture = str | Path | Image.Image


class Captioner:
    """A trained model with its tokenizer, ready to caption pictures."""

    def __init__(self, model: MultimodalModel, tokenizer: Tokenizer, size: int) -> None:
        self.model, self.tokenizer, self.size = model.eval().requires_grad_(False), tokenizer, size

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str = "cpu") -> Captioner:
        """Loads a checkpoint's folder, or the latest checkpoint of a run's folder.

        **Raises** FileNotFoundError, or ValueError naming the file that is damaged, is a pickle or does not fit the model.
        """
        folder = store.find_checkpoint(Path(path))
        name = store.read_json(folder / "run.json").get("model")
        if not isinstance(name, str):
            raise ValueError(f"{folder / 'run.json'}: damaged, it names no model")
        model = models.build(name)
        weights.load(model, folder / "model.safetensors")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        return cls(model.to(device), tokenizer, models.config(name).vision.image_size)

    def caption(self, pictures: Sequence[Picture], prompt: str = "", *, max_new_tokens: int = 32) -> str:
        """Continues a prompt about pictures; greedy, so the same again every time.

        A prompt that holds `<image>` says where each picture stands; otherwise all pictures stand before it, and the
        continuation is about the last one. LaVIN takes one picture or none.
        **Raises** ValueError when pictures and places differ in number; ImageError for a picture that cannot be read.
        """
        text = self._text(len(pictures), prompt)
        device = next(self.model.parameters()).device
        ids = torch.tensor([self.tokenizer.encode(text)], device=device)
        places, mask = self.model.expand(ids)
        pixels = self._pixels(pictures).to(device) if pictures else None
        told: dict[str, Any] = self._instruction(prompt, len(pictures))
        answer = self.model.generate(pixels, places, mask, max_new_tokens=max_new_tokens, **told)
        return self.tokenizer.decode(answer[0].tolist()).strip()

    def _text(self, pictures: int, prompt: str) -> str:
        least, most = (0, 1) if isinstance(self.model, Lavin) else (1, MAX_IMAGES)
        if not least <= pictures <= most:
            raise ValueError(f"pictures: got {pictures}, expected {least} to {most}")
        if not pictures and not prompt.strip():
            raise ValueError("prompt: got none, expected words where there is no picture")
        places = prompt.count(IMAGE)
        if places not in (0, pictures):
            raise ValueError(
                f"prompt: got {places} {IMAGE} for {pictures} pictures, expected as many, or none"
            )
        # tokens of words hold the space before them: one at the prompt's end would belong to the next word
        return prompt.rstrip() if places else IMAGE * pictures + prompt.strip()

    def _instruction(self, prompt: str, pictures: int) -> dict[str, Any]:
        """The prompt without its pictures, for queries that read it; LLaMA-VID's read it for every picture, as for frames."""
        asks = isinstance(self.model, LlamaVid)
        if not asks and not getattr(self.model.config, "instruct", False):
            return {}
        words = self.tokenizer.encode(prompt.replace(IMAGE, " ").strip() or INSTRUCTIONS[0])
        ids = torch.tensor([words], device=next(self.model.parameters()).device)
        return (
            {"prompt_ids": ids.unsqueeze(1).expand(-1, pictures, -1)}
            if asks
            else {"instruction": Instruction(ids)}
        )

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor:
        opened = [p if isinstance(p, Image.Image) else images.load(p) for p in pictures]
        squares = [images.square(p.convert("RGB"), self.size) for p in opened]
        return images.normalise(np.stack(squares)).unsqueeze(0)
