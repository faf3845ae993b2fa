"""From words, pictures, a video and a sound to words and what they ask for: a NExT-GPT at work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkernels.data import images, sounds
from mmkernels.infer.captioner import Captioner, Picture
from mmkernels.models.next_gpt import MODALITIES
from mmkernels.models.next_gpt_text import prompt as written


class Answer(NamedTuple):
    """The words, what was asked for by name ("image", "video", "audio"), and what was made: pixels, or samples of a sound."""

    text: str
    asked: tuple[str, ...]
    made: dict[str, NDArray[np.uint8] | Tensor]


class AnyToAny(Captioner):
    """A trained NExT-GPT with its tokenizer."""

    def answer(
        self,
        prompt: str,
        pictures: Sequence[Picture] = (),
        *,
        video: Sequence[Picture] = (),
        audio: str | Path | None = None,
        seed: int = 0,
        max_new_tokens: int = 32,
    ) -> Answer:
        """Follows an instruction about what is given before it: pictures, the frames of one video, a sound, in this order.

        Words are the likeliest ones; what is made starts from noise of `seed`.
        **Raises** ValueError for no instruction and for inputs that cannot be read.
        """
        if not prompt.strip():
            raise ValueError("prompt: got none, expected an instruction")
        model: Any = self.model
        config, device = model.config, next(model.parameters()).device
        kinds = [0] * len(pictures) + [1] * bool(video) + [2] * (audio is not None)
        places = [config.signals[kind].place for kind in kinds]
        ids = torch.tensor(
            [written(prompt.strip(), places, self.tokenizer.encode, config.bos)], device=device
        )
        media = model.encode(
            self._pixels(pictures).to(device) if pictures else None,
            self._pixels(video).unsqueeze(1).to(device) if video else None,
            None if audio is None else sounds.load(audio)[None, None].to(device),
        )
        generator = torch.Generator(device).manual_seed(seed)
        response = model.respond(
            *model.expand(ids), media=media, generator=generator, max_new_tokens=max_new_tokens
        )
        signals = {token for signal in config.signals for token in signal.ids}
        said = [token for token in response.ids[0].tolist() if token not in signals]
        made = {name: x if x.dim() == 1 else images.denormalise(x) for name, x in response.made[0].items()}
        asked = tuple(name for name in MODALITIES if name in response.conditions[0])
        return Answer(self.tokenizer.decode(said).strip(), asked, made)


def save(answer: Answer, folder: Path) -> dict[str, str]:
    """Writes what was made into a folder: `image.png`, `video.gif`, `audio.wav`; returns the paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, made in answer.made.items():
        path = folder / {"image": "image.png", "video": "video.gif", "audio": "audio.wav"}[name]
        if isinstance(made, Tensor):
            sounds.save(path, made.cpu())
        else:
            frames = [Image.fromarray(frame) for frame in (made if name == "video" else made[None])]
            more: dict[str, Any] = (
                {"save_all": True, "append_images": frames[1:], "duration": 250} if name == "video" else {}
            )
            frames[0].save(path, **more)
        paths[name] = str(path)
    return paths
