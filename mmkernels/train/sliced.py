"""Training of models that cut pictures of any size: LLaVA-UHD, Monkey, Fuyu, SliME; and how many held-out pages they read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkernels.data import Dataset, Tokenizer, cuttings
from mmkernels.data.cuttings import CutBatch, Cuttings
from mmkernels.data.looks import Looked, look
from mmkernels.data.scenes import SLOTS, Cutting
from mmkernels.models import LlavaUHD, Monkey, Stage
from mmkernels.train.evaluate import evaluating, shuffle
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH, _PLACES = 128, 32, 24  # pages tried when a stage ends, at a time; places of an echo


def words(config: Any) -> int:
    """How many tokens text has before those that mark pictures and turns."""
    if hasattr(config, "marks"):
        m = config.marks
        return min(m.image_end, m.slot, m.turn, m.newline, m.assistant)
    names = ("comma", "newline", "separator", "begin", "answer")
    return min(getattr(config, name) for name in names if hasattr(config, name))


def pictures(dataset: Dataset, tokenizer: Tokenizer, config: Any, seed: int) -> Cuttings:
    """The data of a run. **Raises** ValueError when texts need tokens that the model marks pictures with."""
    if len(tokenizer) > words(config):
        raise ValueError(f"data: its captions have {len(tokenizer)} tokens, expected at most {words(config)}")
    return Cuttings(
        dataset,
        tokenizer,
        0,  # every picture has a size of its own
        opening=lambda asked: opening(config, asked),
        end=(config.tokens.end_of_text,),
        seed=seed,
    )


def opening(config: Any, asked: Sequence[int]) -> list[int]:
    """A question as the model's `opening` writes it: Fuyu has tokens that begin a prompt and an answer."""
    if hasattr(config, "answer"):
        return [config.tokens.image, config.begin, *asked, config.answer]
    return [config.tokens.image, *asked]


def texts(dataset: Dataset, config: Any) -> Iterable[str]:
    return cuttings.texts(dataset)


class SlicedObjectives(Objectives):
    """`patches`: a linear head tells what every patch of every view holds, in its left and its right half. `echoes`: the
    language model goes on behind an answer's own words in the places of a picture. `pairs`, `instructions`: answers about
    pictures.
    """

    model: Any
    sequences: Any

    def __init__(self, model: Any, sequences: Cuttings, batch: int, device: str) -> None:
        self.model, self.sequences, self.batch, self.device = model, sequences, batch, device
        vision = getattr(model.config, "vision", None)
        width = model.config.lm.block.width if vision is None else vision.width
        self.head = nn.Linear(width, SLOTS * sequences.kinds).to(device)

    def names(self) -> tuple[str, ...]:
        return ("patches", "echoes", "pairs", "instructions")

    def parameters(self, stage: Stage) -> list[dict]:
        groups = stage.parameter_groups(self.model)
        if "patches" in stage.losses:
            groups.append({"params": list(self.head.parameters()), "weight_decay": 0.0})
        return groups

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        if name not in self.names():
            known = ", ".join(self.names())
            raise ValueError(f"stage {stage.name!r}: loss {name!r} is unknown, expected one of {known}")
        size = self._size(name, stage.mix)
        if name == "patches":
            return self._patches(self.sequences.shown(number, size))
        if name == "echoes":
            ids, mask, labels = self._echo(self.sequences.instructions(number, size), number)
            return self.model(None, ids.to(self.device), mask.to(self.device), labels.to(self.device)).loss
        batch = getattr(self.sequences, name)(number, size)
        made, media = told(self.model, batch, batch.images)
        return self.model(None, made.ids, made.mask, made.labels, media=media).loss

    def _patches(self, rows: list[Cutting]) -> Tensor:
        config = self.model.config
        looked, patch = see(config, rows), patch_size(config)
        kinds = [
            k
            for row, seen in zip(rows, looked, strict=True)
            for k in self.sequences.patches(row, seen, patch)
        ]
        views = [view.to(self.device) for seen in looked for view in seen.views]
        found = self.head(tower(self.model, views)).float().unflatten(-1, (SLOTS, -1))
        return F.cross_entropy(
            found.flatten(0, 1), torch.cat([k.flatten(0, 1) for k in kinds]).flatten().to(self.device)
        )

    def _echo(self, batch: CutBatch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Texts whose image token became places that hold the answer's words somewhere, and else the end of a chunk."""
        random, tokens = torch.Generator().manual_seed(number), self.model.tokens
        rows, answers = [], []
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
            said = labels[(labels != -100) & (labels != tokens.end_of_text)]
            places = torch.full((_PLACES,), tokens.end_of_chunk)
            start = int(torch.randint(_PLACES - len(said) + 1, (), generator=random))
            places[start : start + len(said)] = said
            at = int((ids == tokens.image).nonzero()[0])
            rows.append(torch.cat([ids[:at], places, ids[at + 1 :][mask[at + 1 :]]]))
            hidden = torch.full((_PLACES,), -100)
            answers.append(torch.cat([labels[:at], hidden, labels[at + 1 :][mask[at + 1 :]]]))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=tokens.pad)
        lengths = torch.tensor([len(row) for row in rows])
        return (
            ids,
            torch.arange(ids.shape[1]) < lengths[:, None],
            pad(answers, batch_first=True, padding_value=-100),
        )

    def hits(self, model: Any, batch: Any, pictures: Tensor) -> Tensor:
        return right(model, batch, pictures)


def patch_size(config: Any) -> int:
    vision = config.vision
    return getattr(vision, "patch_size", None) or vision.patch


def tower(model: Any, views: list[Tensor]) -> Tensor:
    """What a model's tower makes of views: `[P, C]`, view after view."""
    if isinstance(model, LlavaUHD):
        x, slice_hw = model.features(views)
        return torch.cat([row[:count] for row, count in zip(x, slice_hw.prod(1).tolist(), strict=True)])
    stacked = torch.stack(views)
    if isinstance(model, Monkey):
        return model.vision.features(stacked).flatten(0, 1)
    return model.vision(stacked).flatten(0, 1)


def see(config: Any, rows: Sequence[Cutting]) -> list[Looked]:
    """Pictures as the model's config has them cut."""
    return [look(Image.fromarray(row.pixels), **config.look) for row in rows]


def told(model: Any, batch: CutBatch, images: Tensor) -> tuple[Any, Any]:
    """What `forward` is given: a text with the places of the pictures that `images` names, and their media."""
    device = next(model.parameters()).device
    looked = see(model.config, batch.shown(images))
    ids, mask, labels = (t.to(device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
    return model.told(looked, ids, mask, labels)


def right(model: Any, batch: CutBatch, images: Tensor) -> Tensor:
    """bool `[B]`: whether greedy decoding gives each row's answer, with these pictures."""
    made, media = told(model, batch, images)
    logits = model(None, made.ids, made.mask, media=media).logits
    wanted = made.labels != -100
    return ((logits.argmax(-1).roll(1, 1) == made.labels) | ~wanted).all(1).cpu()


@torch.no_grad()
def read(
    model: Any, sequences: Cuttings, pages: int, size: tuple[int, int] | None = None
) -> dict[str, float]:
    """Shares of held-out pages whose number is read to the last digit: as they are, and with the pictures of others."""
    found = {"pages read": 0, "pages read, shuffled": 0}
    for number in range(-(-pages // _BATCH)):
        batch = sequences.held_out_pages(number, min(_BATCH, pages - number * _BATCH), size)
        for name, images in zip(found, (batch.images, shuffle(batch)), strict=True):
            found[name] += int(right(model, batch, images).sum())
    return {name: count / pages for name, count in found.items()}


def measure(model: Any, sequences: Cuttings, stage: Stage) -> dict[str, Any]:
    """After a stage that learns from pictures and text: `read`."""
    if not {"pairs", "instructions"} & {*stage.losses}:
        return {}
    with evaluating(model):
        return read(model, sequences, HELD_OUT)
