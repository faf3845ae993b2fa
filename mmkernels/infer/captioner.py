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
from mmkernels.data.dialogues import QUESTION
from mmkernels.data.frames import MAX_FRAMES
from mmkernels.data.looks import look
from mmkernels.data.pairs import INSTRUCTIONS
from mmkernels.data.readings import Sight
from mmkernels.data.sequences import MAX_IMAGES
from mmkernels.data.tokenizer import IMAGE
from mmkernels.models import CogVLM, Lavin, LlamaVid, Llava, Monkey, MultimodalModel, QwenVL, Stage, weights
from mmkernels.models.llava_text import ask
from mmkernels.models.qformer import Instruction
from mmkernels.models.qwen_text import chat_prompt
from mmkernels.models.spliced import Spliced

Picture = str | Path | Image.Image


class Captioner:
    """A trained model with its tokenizer, ready to caption pictures."""

    def __init__(self, model: MultimodalModel, tokenizer: Tokenizer, size: int) -> None:
        self.model, self.tokenizer, self.size = model.eval().requires_grad_(False), tokenizer, size

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, model: str | None = None, device: str = "cpu") -> Captioner:
        """Loads a checkpoint's folder, or the latest checkpoint of a run's folder; `model` is the name it must be of.

        **Raises** FileNotFoundError, or ValueError naming the file that is damaged, is a pickle or does not fit the model, and
        for another model's checkpoint.
        """
        folder = store.find_checkpoint(Path(path))
        name = store.read_json(folder / "run.json").get("model")
        if not isinstance(name, str):
            raise ValueError(f"{folder / 'run.json'}: damaged, it names no model")
        if model is not None and model != name:
            raise ValueError(f"model: got {model!r} for {folder}, expected {name!r}, which was trained there")
        built, config = models.build(name), models.config(name)
        stage = _stage(folder, config)
        built.enter(stage)
        weights.load(built, folder / "model.safetensors")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        vision = getattr(config, "vision", None)  # Fuyu has none, and takes pictures as they are
        return cls(built.to(device), tokenizer, stage.image_size or (vision.image_size if vision else 0))

    def caption(
        self,
        pictures: Sequence[Picture],
        prompt: str = "",
        *,
        video: bool = False,
        max_new_tokens: int = 32,
        **decoding: Any,
    ) -> str:
        """Continues a prompt about pictures; greedy, so the same again every time, unless `models.Decoding`'s options, which it
        takes, say otherwise.

        A prompt that holds `<image>` says where each picture stands; otherwise all pictures stand before it, and the
        continuation is about the last one. LaVIN takes one picture or none. A Qwen-VL and a LLaVA are asked as in their
        conversations, every picture on a line of its own. `video`: the pictures are the frames of one video, which has one
        place in the text (see `data.frames.load`).
        **Raises** ValueError when pictures and places differ in number, and for a video where the model knows none; ImageError
        for a picture that cannot be read.
        """
        device = next(self.model.parameters()).device
        count, frames = (1, self._frames(len(pictures))) if video else (len(pictures), 1)
        if isinstance(self.model, Monkey | Spliced):
            return self._read(self.model, pictures, prompt, max_new_tokens=max_new_tokens, **decoding)
        ids = torch.tensor([self._ids(count, prompt)], device=device)
        if isinstance(self.model, Llava):
            return self._answer(self.model, pictures, ids, max_new_tokens=max_new_tokens, **decoding)
        places, mask = self.model.expand(ids, frames=frames)
        pixels = self._pixels(pictures).to(device) if pictures else None
        pixels = pixels.unsqueeze(1) if video and pixels is not None else pixels
        told: dict[str, Any] = self._instruction(prompt, count)
        answer = self.model.generate(pixels, places, mask, max_new_tokens=max_new_tokens, **told, **decoding)
        return self.tokenizer.decode(answer[0].tolist()).strip()

    def _read(self, model: Any, pictures: Sequence[Picture], prompt: str, **decoding: Any) -> str:
        """Continues a question about pictures of any size, which the model's own plan cuts."""
        text, device = self._text(len(pictures), prompt), next(model.parameters()).device
        if IMAGE in prompt:
            asked = self.tokenizer.encode(text)
        else:
            asked = model.opening(self.tokenizer.encode(prompt.strip() or QUESTION), len(pictures))
        looked = [look(picture, **model.config.look) for picture in _opened(pictures)]
        made, media = model.told(looked, torch.tensor([asked], device=device))
        answer = model.generate(None, made.ids, made.mask, media=media, **decoding)
        return self.tokenizer.decode(answer[0].tolist()).strip()

    def _answer(self, model: Llava, pictures: Sequence[Picture], ids: Tensor, **decoding: Any) -> str:
        """What a LLaVA says of pictures, which it is shown in as many views as its way to look takes."""
        c = model.config
        sight = Sight(c.aspect, self.size, c.vision.patch_size, c.pinpoints, c.rounding)
        seen = [sight.see(p.convert("RGB")) for p in _opened(pictures)]
        plans = [plan for _, plan in seen if plan is not None] or None
        pixels = images.normalise(np.concatenate([views for views, _ in seen])).to(ids.device)
        places, mask = model.expand(ids, plans=plans)
        answer = model.generate(pixels, places, mask, plans=plans, **decoding)
        return self.tokenizer.decode(answer[0].tolist()).strip()

    def _frames(self, frames: int) -> int:
        if isinstance(self.model, CogVLM | Lavin | Llava | QwenVL | Spliced):
            raise ValueError("video: got one for a model of pictures, expected pictures")
        if not 1 <= frames <= MAX_FRAMES:
            raise ValueError(f"video: got {frames} frames, expected 1 to {MAX_FRAMES}")
        return frames

    def _ids(self, pictures: int, prompt: str) -> list[int]:
        text, model, encode = self._text(pictures, prompt), self.model, self.tokenizer.encode
        if isinstance(model, Llava):
            return encode(ask(model.config.template, prompt.strip() or QUESTION, pictures))
        if not isinstance(model, QwenVL):
            return encode(text)
        if IMAGE in prompt:
            return chat_prompt(text, 0, encode, model.tokens, model.marks)
        return chat_prompt(prompt.strip() or QUESTION, pictures, encode, model.tokens, model.marks)

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
        squares = [images.square(p.convert("RGB"), self.size) for p in _opened(pictures)]
        return images.normalise(np.stack(squares)).unsqueeze(0)


def _opened(pictures: Sequence[Picture]) -> list[Image.Image]:
    return [p if isinstance(p, Image.Image) else images.load(p) for p in pictures]


def _stage(folder: Path, config: Any) -> Stage:
    """The stage where a checkpoint was taken; without its record, the last one."""
    state = folder / "checkpoint.json"
    name = store.read_json(state).get("stage") if state.is_file() else None
    return next((stage for stage in config.stages if stage.name == name), config.stages[-1])
