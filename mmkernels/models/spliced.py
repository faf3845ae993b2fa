"""Models whose pictures, of any size and number, become words of the text: visual tokens over places in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models.base import IGNORE, Cache, MultimodalModel, Tokens
from mmkernels.models.places import Expanded, pad_rows
from mmkernels.models.stages import Stage
from mmkernels.ops.sliced_image import splice_embeddings
from mmkernels.primitives import _check

TOWER = "model.vision_tower.vision_tower.vision_model."  # where LLaVA and what grew from it keep a CLIP tower


class Spliced(MultimodalModel):
    """Visual tokens `[V, C]` take the places of `tokens.image`, in the order of the batch: row by row.

    Separators are tokens of the text. `tokens.image` needs no row in the embedding.
    """

    config: Any

    def stages(self) -> list[Stage]:
        """The training recipe; see `Stage`."""
        return list(self.config.stages)

    def sees(self) -> Sequence[nn.Module]:
        """The modules that make visual tokens."""
        raise NotImplementedError

    def nothing(self, like: Tensor) -> Any:
        """A black picture, as `encode` takes it."""
        raise NotImplementedError

    def expand(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        frames: int = 1,
        runs: Sequence[Sequence[int]] = (),
    ) -> tuple[Tensor, Tensor]:
        """Ids `[B, T]` with one image token a picture -> ids with the run of each, and their mask, padded on the right.

        `runs[k]` is what stands for the batch's k-th picture: a plan's `ids`. **Raises** ValueError for videos and when
        pictures and runs differ in number.
        """
        if frames != 1:
            raise ValueError(f"frames: got {frames}, expected 1: {type(self).__name__} reads pictures")
        made = place_runs(input_ids, self.tokens, runs, attention_mask=attention_mask)
        return made.ids, made.mask

    def condition(self, input_ids: Tensor, media: Tensor | None, cache: Cache | None) -> None:
        """Nothing between the blocks; on CPU places are checked where a text begins: later a model may write such tokens."""
        begins = cache is None or cache.text.length == 0
        rows = 0 if media is None else media.shape[0]
        if (begins or rows) and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_places(input_ids == self.tokens.image, rows)

    def embed(self, input_ids: Tensor, media: Tensor | None) -> Tensor:
        """Text embeddings `[B, T, C]` with the rows of media `[V, C]` at the places for them."""
        place, vocab = input_ids == self.tokens.image, self.lm.config.vocab
        known = 0 <= self.tokens.image < vocab
        x = self.lm.embed(input_ids if known else torch.where(place, 0, input_ids))
        if media is None or media.shape[0] == 0:
            return self._reachable(x)
        _check.shapes(media=(media, f"V {x.shape[-1]}"))
        return splice_embeddings(x, media, place)

    def opening(self, words: Sequence[int], pictures: int = 1) -> list[int]:
        """What is asked about pictures, up to where the answer begins; one image token for each."""
        return [*[self.tokens.image] * pictures, *words]

    def told(
        self,
        looked: Sequence[Any],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Expanded, Any]:
        """A text with one image token a picture, and what `data.looks` made of the pictures -> text and media for `forward`."""
        runs = [self.layout(one) for one in looked]
        made = place_runs(input_ids, self.tokens, runs, attention_mask=attention_mask, labels=labels)
        return made, self.encode(self.arrange(looked))

    def layout(self, one: Any) -> list[int]:
        """What stands in a text for a picture as `data.looks` has it."""
        names = {
            name: getattr(self.config, name) for name in ("newline", "comma") if hasattr(self.config, name)
        }
        return one.plan.ids(self.tokens.image, **names).tolist()

    def shown(self, one: Any) -> Sequence[Tensor]:
        """The views of a picture that are read."""
        return one.views

    def arrange(self, looked: Sequence[Any]) -> Any:
        """What `encode` takes, of what `data.looks` made of pictures."""
        device = self.lm.embedding.weight.device
        return [view.to(device) for one in looked for view in self.shown(one)]

    def _reachable(self, x: Tensor) -> Tensor:
        """In training a batch without pictures reads a black one, times 0: every rank's graph has the same parameters."""
        learns = self.training and torch.is_grad_enabled()
        if not (learns and any(p.requires_grad for part in self.sees() for p in part.parameters())):
            return x
        return x + 0 * self.encode(self.nothing(x)).mean().to(x.dtype)

    def _check_places(self, place: Tensor, rows: int) -> None:
        """Reads values."""
        found = int(place.sum())
        if found != rows:
            counts = ", ".join(map(str, place.sum(1).tolist()))
            raise ValueError(
                f"input_ids: got {found} places for visual tokens (by row: {counts}), expected {rows}, as many as there are"
            )

    def _check(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, cache: Cache | None) -> None:
        known = ids if ids.is_floating_point() else torch.where(ids == self.tokens.image, 0, ids)
        super()._check(known, mask, labels, cache)


def place_runs(
    input_ids: Tensor,
    tokens: Tokens,
    runs: Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Expanded:
    """Makes the k-th `tokens.image` of the batch the ids `runs[k]`, row by row.

    **Shapes** input_ids, attention_mask (True at text; None: all is), labels `[B, T]`. **Edge** runs have the label -100;
    padding of the input is dropped; no rows give no rows. **Raises** ValueError for shapes and another number of runs.
    """
    _check.shapes(
        input_ids=(input_ids, "B T"), attention_mask=(attention_mask, "B T"), labels=(labels, "B T")
    )
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    found = int(((input_ids == tokens.image) & keep).sum())
    if found != len(runs):
        raise ValueError(f"runs: got {len(runs)} for {found} pictures in input_ids, expected as many")
    device, rest = input_ids.device, iter(runs)
    rows, answers = [], []
    for b in range(len(input_ids)):
        ids = input_ids[b][keep[b]]
        told = None if labels is None else labels[b][keep[b]]
        row, answer = [], []
        for k, part in enumerate(_split(ids, tokens.image)):
            if k % 2:
                run = torch.as_tensor([*next(rest)], dtype=ids.dtype, device=device)
                row.append(run)
                answer.append(torch.full_like(run, IGNORE, dtype=torch.int64))
            else:
                row.append(ids[part])
                answer.append(ids[:0].long() if told is None else told[part])
        rows.append(torch.cat(row))
        answers.append(torch.cat(answer))
    made, mask = pad_rows(rows, tokens.pad, like=input_ids)
    if labels is None:
        return Expanded(made, mask, None)
    return Expanded(made, mask, pad_rows(answers, IGNORE, like=labels)[0])


def _split(ids: Tensor, image: int) -> list[slice]:
    """Text, picture, text, ... of a row: pictures at odd indices."""
    parts, start = [], 0
    for at in (ids == image).nonzero().flatten().tolist():
        parts += [slice(start, at), slice(at, at + 1)]
        start = at + 1
    return [*parts, slice(start, len(ids))]
