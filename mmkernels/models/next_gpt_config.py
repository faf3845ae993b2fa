"""What a NExT-GPT is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mmkernels.layers.decoder import DecoderConfig
from mmkernels.layers.lora import LoraConfig
from mmkernels.layers.vision import VisionConfig
from mmkernels.models.base import Output, Tokens
from mmkernels.models.next_gpt_parts import MakerConfig
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check

MODALITIES = ("image", "video", "audio")


@dataclass(frozen=True)
class Signal:
    """How a modality is asked for: the tokens `ids`, `stride` apart, become `queries` conditions of `width`; `scale` weighs
    their alignment loss. `place` stands in the text where an input of this modality does.
    """

    place: int
    ids: tuple[int, ...]
    queries: int
    width: int
    scale: float = 1.0
    stride: int = 1
    maker: MakerConfig | None = None

    @property
    def span(self) -> int:
        return (len(self.ids) - 1) * self.stride + 1


@dataclass(frozen=True)
class GroupingConfig:
    """Arguments of `GroupingProjector`."""

    hidden: int = 512
    heads: int = 8
    depths: tuple[int, ...] = (6, 3, 3)
    tokens: tuple[int, ...] = (64, 8, 0)
    groups: tuple[int, ...] = (64, 8)


@dataclass(frozen=True)
class NextGptConfig:
    """A whole NExT-GPT; `signals` are those of image, video and audio. `stages` are its training recipe; the last one says
    what a freshly built model trains.

    `joint` is the width of the encoders' vectors. They enter by `grouping`, or (None) by one linear as in the first release.
    `bos` opens a text. `hidden`, `layers` and `init` are the output projections'.
    """

    vision: VisionConfig
    audio: VisionConfig
    lm: DecoderConfig
    tokens: Tokens
    bos: int
    signals: tuple[Signal, Signal, Signal]
    stages: tuple[Stage, ...]
    joint: int = 1024
    grouping: GroupingConfig | None = GroupingConfig()
    lora: LoraConfig | None = None
    hidden: int = 512
    layers: int = 4
    init: str = "zero"

    @property
    def places(self) -> int:
        """Tokens of an input."""
        return 1 if self.grouping is None else self.grouping.groups[-1]

    def signal(self, name: str) -> Signal:
        _check.choice("modality", name, MODALITIES)
        return self.signals[MODALITIES.index(name)]


class Media(NamedTuple):
    """Tokens of a batch's inputs, each `[B, inputs, places, C]` or None."""

    image: Tensor | None = None
    video: Tensor | None = None
    audio: Tensor | None = None


@dataclass
class NextGptOutput(Output):
    """With labels: `text_loss`, and by modality the `alignment` losses, of which `loss` is the weighted sum."""

    text_loss: Tensor | None = None
    alignment: Mapping[str, Tensor] = field(default_factory=dict)


class Response(NamedTuple):
    """New ids `[B, N]`, and what each row asked for: by modality its conditions `[queries, width]`, and the made sample."""

    ids: Tensor
    conditions: list[dict[str, Tensor]]
    made: list[dict[str, Tensor]]
