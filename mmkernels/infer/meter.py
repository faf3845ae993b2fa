"""Watches an answer as it is written: its text so far, and how fast its tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from mmkernels.data import Tokenizer


class Meter:
    """An `on_token` for one prompt: hands every new piece of text to `show`, if given, and keeps the time of each token."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], object] | None = None) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.shown = ""
        self.begun = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, token: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.show is None:
            return
        self.ids.append(int(token[0]))
        text = self.tokenizer.decode(self.ids).lstrip()
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self.show(text.removeprefix(self.shown))
            self.shown = text

    def rates(self) -> dict[str, float]:
        """Seconds to the first token, with pictures and prompt, and tokens a second after it; empty before any token."""
        if not self.times:
            return {}
        found = {"first_token_seconds": round(self.times[0] - self.begun, 4)}
        if len(self.times) > 1:
            found["tokens_per_second"] = round(
                (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-9), 1
            )
        return found
