"""Training of NExT-GPT: what comes in is named, what is asked for is made; how much of either is right on held-out inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.data import Dataset, Tokenizer, sounds
from mmkernels.data.mixtures import QUESTIONS
from mmkernels.data.switching import ASK, VERBS, SwitchBatch, Switching, Writing
from mmkernels.models import NextGptConfig, Stage
from mmkernels.models.next_gpt import MODALITIES
from mmkernels.models.next_gpt_text import ASSISTANT, CAPTION, CLOSE, HUMAN, OPEN, answer, prompt
from mmkernels.train.evaluate import evaluating, right
from mmkernels.train.objectives import Objectives

HELD_OUT, _BATCH = 96, 48  # inputs that are tried when a stage ends, and at a time
_KNOWN, _LONGEST = 8, 28  # real inputs that a caption is known by; tokens of an answer


def words(config: NextGptConfig) -> int:
    """How many tokens text has before those of places and signals."""
    others = [t for s in config.signals for t in (s.place, *s.ids)]
    return min(t for t in others if t != config.tokens.image)


def texts(dataset: Dataset, config: NextGptConfig) -> list[str]:
    """All that samples are written of."""
    captions = (*dataset.captions, *sounds.CAPTIONS)
    asked = (*(f"{verb} this" for verb in VERBS), ASK, CAPTION, *QUESTIONS)
    framed = [f"{HUMAN}{OPEN}{CLOSE}{ask}{ASSISTANT}{caption}\n" for ask in asked for caption in captions]
    told = [
        f"{HUMAN}{verb} {caption}.{ASSISTANT}{caption}\n" for verb in ("say", *VERBS) for caption in captions
    ]
    return [*captions, *framed, *told]


def switching(dataset: Dataset, tokenizer: Tokenizer, config: NextGptConfig, seed: int) -> Switching:
    """The data of a run. **Raises** ValueError when the texts' tokens reach those of places and signals."""
    if len(tokenizer) > words(config):
        raise ValueError(f"data: its texts have {len(tokenizer)} tokens, expected at most {words(config)}")
    places = tuple(signal.place for signal in config.signals)

    def ask(instruction: str, comes: list[int]) -> list[int]:
        ids = prompt(instruction, [places[m] for m in comes], tokenizer.encode, config.bos)
        return [i for t in ids for i in ((t,) * config.places if t in places else (t,))]

    def say(text: str, asked: int | None) -> list[int]:
        signals = () if asked is None else config.signals[asked].ids
        return answer(text, signals, tokenizer.encode, config.tokens.end_of_chunk)

    writing = Writing(ask, say, places, CAPTION)  # type: ignore[arg-type]
    return Switching(dataset, tokenizer, config.vision.image_size, seed=seed, writing=writing)


def smaller(x: Tensor, side: int) -> Tensor:
    """Pictures or frames `[..., 3, S, S]` at another side."""
    if x.shape[-1] == side:
        return x
    flat = x.flatten(0, -4)
    return F.interpolate(flat, (side, side), mode="bilinear", antialias=True).unflatten(0, x.shape[:-3])


class NextGptObjectives(Objectives):
    """`inputs`: an encoder's vector tells the caption's number. `echoes`: answers behind the caption's own words. `makers`: a
    sample is predicted from noise and the states of its caption. `encoding`, `decoding`, `instructions`: the answer, and for
    what it asks for the distance of the conditions from those states.
    """

    model: Any
    sequences: Any

    def __init__(self, model: Any, sequences: Switching, batch: int, device: str) -> None:
        super().__init__(model, sequences, batch, device)
        self.head: Any = nn.Linear(model.config.joint, len(sequences.captions)).to(device)
        encode = sequences.tokenizer.encode
        rows = [torch.tensor(encode(caption)) for caption in sequences.captions]
        self.texts = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0).to(device)

    def names(self) -> tuple[str, ...]:
        return ("inputs", "echoes", "makers", "encoding", "decoding", "instructions")

    def loss(self, name: str, number: int, stage: Stage) -> Tensor:
        """The loss `name` on its batch `number`, of the size that the stage's mix asks for."""
        if name not in self.names():
            known = ", ".join(self.names())
            raise ValueError(f"stage {stage.name!r}: loss {name!r} is unknown, expected one of {known}")
        size = self._size(name, stage.mix)
        if name in ("inputs", "makers"):
            part = self._named if name == "inputs" else self._made  # pictures are half of them
            return torch.stack(
                [part(m, number, max(1, size // (2 if m == 0 else 4))) for m in range(3)]
            ).mean()
        batch: SwitchBatch = getattr(self.sequences, name)(number, size)
        loss = self.model(
            **given(batch, self.device), labels=batch.labels.to(self.device), targets=self.targets(batch)
        ).loss
        assert isinstance(loss, Tensor)
        return loss

    def _named(self, modality: int, number: int, size: int) -> Tensor:
        inputs, captions = self.sequences.inputs(number, size, modality)
        vectors = self.model.read(MODALITIES[modality], inputs.to(self.device)).flatten(0, 1)
        return F.cross_entropy(
            self.head(vectors * vectors.shape[-1] ** 0.5).float(), captions.to(self.device)
        )

    def _made(self, modality: int, number: int, size: int) -> Tensor:
        inputs, captions = self.sequences.inputs(number, size, modality)
        maker = self.model.makers[MODALITIES[modality]]
        shape = maker.config.shape
        x = (inputs[:, 0] if modality == 2 else smaller(inputs[:, 0], shape[-1])).to(self.device)
        told = maker.conditions(self.texts[captions.to(self.device)])
        return maker.loss(told, x, torch.randn_like(x), torch.rand(len(x), device=x.device))

    @torch.no_grad()
    def targets(self, batch: SwitchBatch) -> dict[str, Tensor]:
        """The text states of what the rows ask for, by modality; of none that no row asks for."""
        ids = self.texts[batch.captions.to(self.device)]
        asked = [MODALITIES[m] for m in range(3) if bool((batch.asked == m).any())]
        return {name: self.model.makers[name].conditions(ids) for name in asked}

    def parameters(self, stage: Stage) -> list[dict]:
        groups = stage.parameter_groups(self.model)
        if "inputs" in stage.losses:
            groups.append({"params": list(self.head.parameters()), "weight_decay": 0.0})
        return groups


def given(batch: SwitchBatch, device: Any) -> dict[str, Tensor | None]:
    """What the model is given of a batch: inputs of a kind only if a row has them."""
    inputs = {"images": batch.images, "videos": batch.videos, "audios": batch.audios}
    there = {name: x.to(device) if bool(x.any()) else None for name, x in inputs.items()}
    return {
        **there,
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
    }


@torch.no_grad()
def answers(model: Any, sequences: Switching, count: int) -> dict[str, float]:
    """Shares of held-out inputs that are described right, by modality."""
    device, hits = next(model.parameters()).device, torch.zeros(3)
    for number in range(-(-count // _BATCH)):
        batch = sequences.encoding(number, _BATCH, held_out=True)
        found = right(model(**given(batch, device)).logits.cpu(), batch)
        hits += torch.stack([found[m::3].float().mean() for m in range(3)])
    return {
        f"{name}s described": float(h) / -(-count // _BATCH) for name, h in zip(MODALITIES, hits, strict=True)
    }


@torch.no_grad()
def made(model: Any, sequences: Switching) -> dict[str, float]:
    """Each caption is asked for once in each modality that has it: is the modality asked for, is what is made recognised (by
    the encoder: nearest of the captions' mean vectors), and how often are real held-out inputs.
    """
    figures, device = {}, next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for m, name in enumerate(MODALITIES):
        first, last = (
            (0, len(sequences.dataset.captions))
            if m < 2
            else (len(sequences.dataset.captions), len(sequences.captions))
        )
        known = torch.stack([_mean(model, sequences, m, c, device) for c in range(first, last)])
        asked = [
            sequences.writing.prompt(f"{VERBS[m]} {sequences.captions[c]}", []) for c in range(first, last)
        ]
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked], device=device)
        response = model.respond(ids, ids != 0, max_new_tokens=_LONGEST, generator=generator)
        hits = [_recognised(model, m, row.get(name), known) == n for n, row in enumerate(response.made)]
        real, captions = sequences.inputs(1, HELD_OUT, m, held_out=True)
        near = (model.read(name, real.to(device)).flatten(0, 1) @ known.T).argmax(1).cpu()
        figures |= {
            f"{name}s asked for": sum(name in row and len(row) == 1 for row in response.conditions)
            / len(asked),
            f"{name}s made, recognised": sum(hits) / len(asked),
            f"{name}s, real ones recognised": float((near == captions - first).float().mean()),
        }
    return figures


def _mean(model: Any, sequences: Switching, modality: int, caption: int, device: Any) -> Tensor:
    inputs, _ = sequences.inputs(0, _KNOWN, modality, captions=torch.full((_KNOWN,), caption))
    return model.read(MODALITIES[modality], inputs.to(device)).flatten(0, 1).mean(0)


def _recognised(model: Any, modality: int, sample: Tensor | None, known: Tensor) -> int:
    """The nearest caption's number; -1 where nothing was made."""
    if sample is None:
        return -1
    x = sample if modality == 2 else smaller(sample[None], model.config.vision.image_size)[0]
    return int((model.read(MODALITIES[modality], x[None, None]).flatten() @ known.T).argmax())


def measure(model: Any, sequences: Switching, stage: Stage) -> dict[str, Any]:
    """After the stages that describe: `answers`; after those that ask: `made`."""
    with evaluating(model):
        figures = answers(model, sequences, HELD_OUT) if stage.name in ("encoding", "instructions") else {}
        return figures | (made(model, sequences) if stage.name in ("decoding", "instructions") else {})
