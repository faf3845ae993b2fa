"""NExT-GPT: a language model that reads pictures, videos and sounds, and asks for them by signal tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.decoder import Decoder
from mmkernels.layers.grouping_projector import GroupingProjector
from mmkernels.layers.lora import add_lora
from mmkernels.layers.output_projection import OutputProjection, alignment_loss
from mmkernels.models.base import Cache, MultimodalModel, Output, Tokens, fill_places, pad_left
from mmkernels.models.next_gpt_config import MODALITIES as MODALITIES
from mmkernels.models.next_gpt_config import Media as Media
from mmkernels.models.next_gpt_config import NextGptConfig as NextGptConfig
from mmkernels.models.next_gpt_config import NextGptOutput, Response
from mmkernels.models.next_gpt_parts import Encoder, Maker, spectrogram
from mmkernels.models.next_gpt_tables import whole_table
from mmkernels.models.places import expand_images
from mmkernels.models.places import pad_rows as pad_rows
from mmkernels.models.stages import Stage
from mmkernels.primitives import _check


class NextGpt(MultimodalModel):
    """See `NextGptConfig`. Inputs take the places of their kind in the text, in order; `expand` widens one place to all.

    Encoders are towers of this library, not ImageBind's weights; presets of published size have no `makers`: conditions are
    what a diffusion pipeline takes in place of its text's states. The tiny one has, so that what is asked for is made.
    """

    sources = ("next_gpt",)

    def __init__(self, config: NextGptConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokens, width = c.tokens, c.lm.block.width
        self.vision, self.audio = Encoder(c.vision, c.joint), Encoder(c.audio, c.joint)
        g = c.grouping
        self.project = nn.Linear(c.joint, width)
        if g is not None:
            self.project = GroupingProjector(
                c.joint,
                width,
                hidden=g.hidden,
                heads=g.heads,
                depths=g.depths,
                tokens=g.tokens,
                groups=g.groups,
            )
        self.lm = Decoder(c.lm)
        if c.lora is not None:
            add_lora(self.lm, c.lora)
        named = dict(zip(MODALITIES, c.signals, strict=True))
        self.out = nn.ModuleDict(
            {
                name: OutputProjection(
                    width, s.width, s.queries, hidden=c.hidden, layers=c.layers, init=c.init
                )
                for name, s in named.items()
            }
        )
        makers = {n: Maker(s.maker, c.lm.vocab, s.queries, s.width) for n, s in named.items() if s.maker}
        self.makers = nn.ModuleDict(makers)
        c.stages[-1].freeze(self)

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    @torch.no_grad()
    def start_new_tokens(self, first: int) -> None:
        """Rows of tokens from `first` on start as the mean of those before, in embedding and head, as in the second release."""
        tables = [self.lm.embedding.weight, *([] if self.lm.head is None else [self.lm.head.weight])]
        for table in tables:
            table[first:] = table[:first].mean(0)

    def read(self, name: str, inputs: Tensor) -> Tensor:
        """Inputs of one modality -> their encoder's vectors `[B, inputs, joint]`; see `forward` for shapes."""
        letters = {"image": "B I 3 H W", "video": "B I F 3 H W", "audio": "B I L"}[name]
        size = _check.shapes(**{f"{name}s": (inputs, letters)})
        flat = inputs.flatten(0, 1)
        if name == "audio":
            found = self.audio(spectrogram(flat, self.config.audio.image_size).unsqueeze(1))
        else:
            found = self.vision(flat.unsqueeze(1) if name == "image" else flat)
        return found.unflatten(0, (size["B"], size["I"]))

    def encode(  # type: ignore[override]
        self, images: Tensor | None = None, videos: Tensor | None = None, audios: Tensor | None = None
    ) -> Media:
        """Pictures, videos and sounds -> their tokens."""
        found = {}
        for name, inputs in zip(MODALITIES, (images, videos, audios), strict=True):
            if inputs is not None and inputs.shape[1]:
                vectors = self.read(name, inputs)
                flat = vectors.flatten(0, 1).unsqueeze(1)
                tokens = self.project(flat.to(next(self.project.parameters()).dtype))
                found[name] = tokens.unflatten(0, vectors.shape[:2])
        return Media(**found)

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, frames: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` with one place an input -> ids with all places, and their mask, padded on the right."""
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        for signal in self.config.signals:
            tokens = Tokens(signal.place, self.tokens.end_of_chunk, self.tokens.end_of_text, self.tokens.pad)
            input_ids, mask, _ = expand_images(input_ids, tokens, self.config.places, attention_mask=mask)
        return input_ids, mask

    def embed(self, input_ids: Tensor, media: Any) -> Tensor:
        """Token embeddings with the tokens of every modality at its places, in order."""
        x = self.lm.embed(self._written(input_ids))
        for name, signal in zip(MODALITIES, self.config.signals, strict=True):
            tokens = None if media is None else getattr(media, name)
            place = input_ids == signal.place
            self._check_places(name, place, 0 if tokens is None else tokens.shape[1] * tokens.shape[2])
            if tokens is not None:
                x = fill_places(x, place, tokens.flatten(1, 2))
        return x

    def _written(self, ids: Tensor) -> Tensor:
        """Ids without places: these have no row in the embedding, or one that is not read."""
        if ids.is_floating_point():
            return ids
        for signal in self.config.signals:
            ids = torch.where(ids == signal.place, 0, ids)
        return ids

    def _check_places(self, name: str, place: Tensor, rows: int) -> None:
        if place.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking at values would make the host wait
        counts = place.sum(1)
        if bool(((counts != rows) & (counts != 0)).any()):
            got = ", ".join(str(int(n)) for n in counts)
            raise ValueError(
                f"input_ids: got {got} places for {name}s, expected {rows} in a row (or 0: the row has none)"
            )

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        videos: Tensor | None = None,
        audios: Tensor | None = None,
        targets: Mapping[str, Tensor] | None = None,
        media: Any = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> NextGptOutput:
        """As `MultimodalModel.forward`, with inputs of three kinds and with targets: by modality the text states of a
        diffusion model, for rows that ask for that modality.

        **Shapes** images `[B, I, 3, H, W]`, videos `[B, V, F, 3, H, W]`, audios (waves) `[B, A, L]`; rows without places of a
        kind do not read theirs. targets `[B, queries, width]`: rows without the modality's signal tokens are not read.
        `loss = text_loss + sum over modalities of scale * alignment`, each the mean over rows that ask for it.
        **Raises** ValueError for shapes, and on CPU for signal tokens that begin and do not end.
        """
        if media is None:
            media = self.encode(images, videos, audios)
        out = super().forward(
            None, input_ids, attention_mask, labels, media=media, cache=cache, last_only=last_only
        )
        assert input_ids is not None
        aligned = {}
        for name, target in (targets or {}).items():
            found, asks = self.conditions(out, input_ids, name, strict=True)
            _check.shapes(
                **{f"targets[{name!r}]": (target, f"{found.shape[0]} {found.shape[1]} {found.shape[2]}")}
            )
            known = torch.where(asks[:, None, None], target.to(found), found.detach() + 1)
            distance = alignment_loss(found, known, "none").mean(1)
            aligned[name] = torch.where(asks, distance, 0).sum() / asks.sum().clamp(min=1)
        if out.loss is not None and self.training and torch.is_grad_enabled():
            out.loss = out.loss + self._reach(media, aligned)
        loss = (
            out.loss
            if out.loss is None
            else sum((self.config.signal(n).scale * v for n, v in aligned.items()), out.loss)
        )
        return NextGptOutput(
            out.logits, loss, out.cache, hidden=out.hidden, text_loss=out.loss, alignment=aligned
        )

    def _reach(self, media: Media, aligned: Mapping[str, Tensor]) -> Tensor | int:
        """0, from what a batch did not need: every rank's graph has the same parameters."""
        project: Any = self.project
        width, weight = self.config.lm.block.width, self.lm.embedding.weight
        unused = (
            [] if any(t is not None for t in media) else [project(weight.new_zeros(1, 1, self.config.joint))]
        )
        nothing = weight.new_zeros(1, 1, width)
        unused += [self.out[name](nothing, nothing) for name in MODALITIES if name not in aligned]
        return sum(0 * part.sum() for part in unused if part.requires_grad)

    def conditions(
        self, output: Output, ids: Tensor, name: str, *, strict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What rows that ask for a modality tell its maker: `[B, queries, width]`, and bool `[B]`, whether they ask.

        From the states at the first run of its signal tokens, after the final norm, and the tokens' embeddings.
        **Raises** ValueError, if `strict`, on CPU for a run that is cut off.
        """
        signal = self.config.signal(name)
        assert output.hidden is not None
        first = ids == signal.ids[0]
        start = first.to(torch.int8).argmax(1)
        at = start.unsqueeze(1) + torch.arange(signal.span, device=ids.device)
        inside, at = at[:, -1] < ids.shape[1], at.clamp(max=ids.shape[1] - 1)
        span = ids.gather(1, at)
        whole = (span[:, :: signal.stride] == torch.tensor(signal.ids, device=ids.device)).all(1) & inside
        if (
            strict
            and ids.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and bool((first.any(1) & ~whole).any())
        ):
            raise ValueError(f"input_ids: got a row whose signal tokens of {name} begin and do not end")
        hidden = output.hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, output.hidden.shape[-1]))
        return self.out[name](self.lm.norm(hidden), self.lm.embed(self._written(span))), whole

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        videos: Tensor | None = None,
        audios: Tensor | None = None,
        media: Any = None,
        **options: Any,
    ) -> Tensor:
        """As `MultimodalModel.generate`, with inputs of three kinds."""
        media = self.encode(images, videos, audios) if media is None else media
        return super().generate(None, input_ids, attention_mask, media=media, **options)

    @torch.no_grad()
    def respond(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        media: Media | None = None,
        steps: int = 8,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Response:
        """Answers, and makes what the answers ask for: from instruction to picture, video and sound.

        The first run of a modality's signal tokens in an answer asks for it; conditions are read from a pass over prompt and
        answer. **Shapes** as `generate`, media as `encode` gives them. **Edge** a model without makers gives conditions alone.
        """
        new = self.generate(
            None, input_ids, attention_mask, media=media or Media(), generator=generator, **options
        )
        ids, mask = pad_left(input_ids, attention_mask, self.tokens.pad)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        whole = torch.cat([ids, new], 1)
        seen = torch.cat([mask, torch.ones_like(new, dtype=torch.bool)], 1)
        output = self(None, whole, seen, media=media or Media())
        rows: list[dict[str, Tensor]] = [{} for _ in range(len(ids))]
        made: list[dict[str, Tensor]] = [{} for _ in range(len(ids))]
        for name in MODALITIES:
            said = torch.where(
                torch.arange(whole.shape[1], device=ids.device) >= ids.shape[1], whole, self.tokens.pad
            )
            told, asks = self.conditions(output, said, name)
            for row in asks.nonzero().flatten().tolist():
                rows[row][name] = told[row]
                if name in self.makers:
                    maker: Any = self.makers[name]
                    made[row][name] = maker.make(told[row : row + 1], steps=steps, generator=generator)[0]
        return Response(new, rows, made)

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        super()._check(self._written(ids), mask, labels, cache)

    def published(self, source: str) -> Table:
        """The authors' file of what they train; see `whole_table`."""
        return whole_table(self.lm, self.project, self.out, self.config.lora)
