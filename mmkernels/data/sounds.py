"""Short sounds made by rule, with captions: no recordings, the smallest stand-in that has something to tell.

A sound is a quarter of a second at 4 kHz. Pitch and loudness vary from draw to draw, a little.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RATE, LENGTH = 4000, 1024
CAPTIONS = ("a low tone", "a high tone", "a rising tone", "a falling tone", "a pulsing tone")
_PITCH = (
    (200, 200),
    (700, 700),
    (200, 700),
    (700, 200),
    (400, 400),
)  # in Hz, at the beginning and at the end
_SECONDS = 8  # the longest file that is read


def draw(rng: np.random.Generator, caption: int) -> NDArray[np.float32]:
    """One sound `[LENGTH]` between -1 and 1."""
    first, last = (pitch * rng.uniform(0.998, 1.002) for pitch in _PITCH[caption])
    t = np.arange(LENGTH) / RATE
    phase = first * t + (last - first) * t * t * RATE / (2 * LENGTH)
    sound = rng.uniform(0.7, 1.0) * np.sin(2 * np.pi * phase)
    if caption == CAPTIONS.index("a pulsing tone"):
        sound = sound * (np.floor(t * 24) % 2 == 0)
    return sound.astype(np.float32)


def save(path: Path, sound: Tensor) -> None:
    """Writes a sound `[L]` as 16-bit WAV."""
    samples = (sound.detach().float().clamp(-1, 1) * 32_767).round().to(torch.int16).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def load(path: str | Path) -> Tensor:
    """Reads a 16-bit WAV of one channel at 4 kHz as `[LENGTH]`: cut, or silent behind its end.

    **Raises** FileNotFoundError; ValueError for other files, and for longer ones than 8 seconds.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such sound")
    try:
        with wave.open(str(path), "rb") as file:
            found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            count = file.getnframes()
            if found != (1, 2, RATE) or count > _SECONDS * RATE:
                raise ValueError(
                    f"{path}: got {found[0]} channels of {8 * found[1]} bits at {found[2]} Hz, {count} samples; expected 1 of "
                    f"16 at {RATE}, at most {_SECONDS * RATE} samples"
                )
            raw = file.readframes(min(count, LENGTH))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: not a WAV that can be read ({error})") from None
    samples = torch.from_numpy(np.frombuffer(raw, "<i2").astype(np.float32)) / 32_767
    return torch.nn.functional.pad(samples, (0, LENGTH - len(samples)))
