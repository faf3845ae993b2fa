"""Fuyu and OtterHD: no vision tower. Patches of a picture of any size, through one linear layer, are words of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.decoder import Decoder, DecoderConfig
from mmkernels.models.base import IGNORE, Tokens
from mmkernels.models.spliced import Spliced
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

Pictures = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class FuyuConfig:
    """A whole Fuyu: pictures no larger than `canvas` (width, height), in square patches of side `patch`.

    `tokens.image` stands for a patch, `newline` closes a row of them; both are words with embeddings. `answer` is the token
    after which the model speaks; `begin` opens the prompt behind a picture. `stages` are the training recipe; the last one
    says what a freshly built model trains.
    """

    patch: int
    canvas: tuple[int, int]
    lm: DecoderConfig
    tokens: Tokens
    newline: int
    begin: int
    answer: int
    stages: tuple[Stage, ...]

    @property
    def look(self) -> dict[str, Any]:
        """How pictures are cut: arguments of `data.looks.look`."""
        return {"rule": "fuyu", "options": {"canvas": self.canvas, "patch": self.patch}, "pixels": "raw"}


def patchify(images: Tensor, patch: int = 30) -> Tensor:
    """Cuts pictures into square patches, row by row; inside a patch rows, then columns, then channels: channels run fastest.

    **Shapes** images `[..., C, H, W]`, whole patches each way -> `[..., H W / patch^2, patch^2 C]`. **Dtypes** any.
    **Gradient** images. **Raises** ValueError for shapes. **Source** Fuyu-8B's released processor.
    """
    _check.positive(patch=patch)
    if images.dim() < 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected [..., C, H, W]")
    c, h, w = images.shape[-3:]
    if not h or not w or h % patch or w % patch:
        raise ValueError(f"images: got {h} x {w} pixels, expected whole patches of {patch}")
    cut = images.reshape(-1, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(*images.shape[:-3], (h // patch) * (w // patch), patch * patch * c)


class PatchEmbedding(nn.Linear):
    """One linear layer with a bias from the `3 patch^2` numbers of a patch to a word.

    **Source** Fuyu-8B; `vision_embed_tokens` of its files loads by `weights.load` as `fuyu`.
    """

    sources = ("fuyu",)

    def __init__(self, patch: int, width: int) -> None:
        _check.positive(patch=patch, width=width)
        super().__init__(3 * patch**2, width)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        """input: pictures `[..., 3, H, W]`, or their patches `[..., P, 3 patch^2]` -> `[..., P, width]`.

        **Raises** ValueError for shapes.
        """
        if input.shape[-1] == self.in_features and input.dim() < 4:
            return super().forward(input)
        return super().forward(patchify(input, self.patch))

    def published(self, source: str) -> Table:
        """Where files of a whole Fuyu, older and newer, keep the layer; or its bare parameters."""
        prefixes = ("", "vision_embed_tokens.", "model.vision_embed_tokens.")
        rules = tuple(Rule("(weight|bias)", (f"{prefix}{{0}}",)) for prefix in prefixes)
        return Table(rules, ignored=(r"(language_model|model\.language_model|lm_head)\..*",))


class Fuyu(Spliced):
    """See `FuyuConfig`. A picture is `rows (columns + 1)` tokens: its patches, and a newline after each row of them.

    Everything is causal. Attention masks of left padding are as for any text.
    """

    sources = ("fuyu",)

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.config, self.tokens = config, config.tokens
        self.patches = PatchEmbedding(config.patch, config.lm.block.width)
        self.lm = Decoder(config.lm)
        config.stages[-1].freeze(self)

    def sees(self) -> Sequence[nn.Module]:
        return (self.patches,)

    def nothing(self, like: Tensor) -> Tensor:
        return like.new_zeros(1, 3, self.config.patch, self.config.patch)

    def run(self, rows: int, columns: int) -> list[int]:
        """The ids of a picture of so many patches: what `expand` takes, and what a plan of `data.slicing.fuyu` gives."""
        return ([self.tokens.image] * columns + [self.config.newline]) * rows

    def encode(self, images: Pictures) -> Tensor:  # type: ignore[override]
        """Pictures `[N, 3, H, W]`, `[B, I, 3, H, W]`, or a sequence of `[3, H, W]` of any sizes -> `[V, C]`: all patches.

        **Raises** ValueError for sizes that are no whole patches, or beyond the canvas.
        """
        weight = self.patches.weight
        pictures = images.flatten(0, -4) if isinstance(images, Tensor) else images
        rows = []
        for picture in pictures:
            size = _check.shapes(images=(picture, "3 H W"))
            width, height = self.config.canvas
            if size["W"] > width or size["H"] > height:
                raise ValueError(
                    f"images: got {size['H']} x {size['W']} pixels, expected at most {height} x {width}"
                )
            rows.append(patchify(picture.to(weight.dtype), self.config.patch))
        if not rows:
            return weight.new_zeros(0, weight.shape[0])
        return self.patches(torch.cat(rows))

    def opening(self, words: Sequence[int], pictures: int = 1) -> list[int]:
        return [*super().opening((), pictures), self.config.begin, *words, self.config.answer]

    def arrange(self, looked: Sequence[Any]) -> list[Tensor]:
        device, patch = self.patches.weight.device, self.config.patch
        return [to_picture(one.canvas.movedim(0, -1).to(torch.uint8), patch).to(device) for one in looked]

    def published(self, source: str) -> Table:
        """The released file, or one that newer versions of Hugging Face's library write."""
        table = self.lm.published("persimmon")
        old = table.under("lm.", "language_model.")
        new = Table(
            tuple(
                replace(rule, ours=r"lm\." + rule.ours, theirs=tuple(map(_newer, rule.theirs)))
                for rule in table.rules
            )
        )
        patches = self.patches.published(source)
        return old + new + Table(Table(patches.rules[1:]).under("patches.", "").rules)


def _newer(key: str) -> str:
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


def to_picture(pixels: Tensor, patch: int) -> Tensor:
    """Pixels uint8 `[H, W, 3]`, no larger than the canvas -> `[3, H', W']` as Fuyu reads it, its sides whole patches.

    What is added on the right and below has the value 1 of 255, then all is `(x / 255 - 1 / 2) / (1 / 2)`.
    """
    _check.shapes(pixels=(pixels, "H W 3"))
    _check.dtypes((torch.uint8,), pixels=pixels)
    h, w, _ = pixels.shape
    padded = F.pad(pixels.movedim(-1, 0).float(), (0, -w % patch, 0, -h % patch), value=1.0)
    return (padded / 255 - 0.5) / 0.5


def answer_labels(
    input_ids: Tensor, answer: int, end_of_text: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Labels `[B, T]` of OtterHD's recipe: what follows a row's first `answer`, up to its second, in whose place
    `end_of_text` is predicted; -100 elsewhere.
    """
    _check.shapes(input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"))
    mark = input_ids == answer
    count = mark.long().cumsum(1)
    labels = torch.where((count == 1) & ~mark, input_ids, IGNORE)
    labels = torch.where((count == 2) & mark, end_of_text, labels)
    return labels if attention_mask is None else torch.where(attention_mask, labels, IGNORE)
