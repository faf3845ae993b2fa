"""BLIP-2 and InstructBLIP before an encoder-decoder: FlanT5 reads pictures and prompt, and writes the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.layers._published import Table
from mmkernels.layers.t5 import T5, T5Config
from mmkernels.models.base import Cache, Output
from mmkernels.models.qformer import Blip2, Blip2Config, Instruction
from mmkernels.models.qformer_tables import blip2_table
from mmkernels.models.seq2seq import decoder_inputs, generate, target_loss
from mmkernels.primitives import _check


@dataclass(frozen=True)
class Blip2Seq2SeqConfig(Blip2Config):
    """As `Blip2Config`, with an encoder-decoder."""

    lm: T5Config  # type: ignore[assignment]

    @property
    def width(self) -> int:
        return self.lm.width


class Blip2Seq2Seq(Blip2):
    """See `Blip2Config`: the encoder reads pictures and prompt, `tokens.pad` starts the decoder, as in FlanT5."""

    lm: Any

    def _language_model(self) -> T5:
        assert isinstance(self.config.lm, T5Config)
        if self.config.lora is not None:
            raise ValueError("lora: got one for an encoder-decoder, expected None: it is a decoder's")
        return T5(self.config.lm)

    def forward(  # type: ignore[override]
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        instruction: Instruction | None = None,
        media: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """One pass over prompts and their answers.

        **Shapes** input_ids `[B, T]` are the prompt, attention_mask bool `[B, T]`; labels `[B, U]` the answer with its end,
        -100 where nothing is predicted. Logits `[B, U, V]`, of its first token alone without labels. **Gradient** as `Blip2`.
        **Raises** ValueError for shapes, ids out of range (on CPU) and a cache: `generate` keeps its own; TypeError for dtypes.
        """
        if cache is not None:
            raise ValueError("cache: got one, expected None: generate keeps an encoder-decoder's")
        ids = self._checked(input_ids, attention_mask, labels)
        if media is None and images is not None:
            media = self.encode(images, instruction)
        states = self.lm.encode(self.embed(ids, media), attention_mask)
        pad = self.tokens.pad
        begun = torch.full_like(ids[:, :1], pad) if labels is None else decoder_inputs(labels, pad)
        logits = self.lm.decode(begun, states, attention_mask)
        loss = None if labels is None else target_loss(logits, labels)
        return Output(logits[:, -1:] if last_only else logits, loss)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        instruction: Instruction | None = None,
        media: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Answers to prompts, ids `[B, N]`; takes the options of `MultimodalModel.generate`."""
        ids = self._checked(input_ids, attention_mask, None)
        if media is None and images is not None:
            media = self.encode(images, instruction)
        options.setdefault("stop", (self.tokens.end_of_text, self.tokens.end_of_chunk))
        pad = self.tokens.pad
        return generate(self.lm, self.embed(ids, media), attention_mask, start=pad, pad=pad, **options)

    def _checked(self, ids: Tensor | None, mask: Tensor | None, labels: Tensor | None) -> Tensor:
        """The prompt's ids, fit to be embedded."""
        if ids is None:
            raise ValueError("input_ids: got None, expected token ids [B, T]")
        _check.shapes(input_ids=(ids, "B T"), attention_mask=(mask, "B T"), labels=(labels, "B U"))
        _check.dtypes((torch.int64, torch.int32), input_ids=ids)
        _check.dtypes((torch.bool,), attention_mask=mask)
        _check.dtypes((torch.int64,), labels=labels)
        vocab = self.lm.config.vocab
        if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            return ids  # looking at values would make the host wait
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(
                f"input_ids: got ids {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab - 1}"
            )
        return ids

    def published(self, source: str) -> Table:
        """Where the released files keep the model."""
        root = "language_model." if source == "huggingface" else "t5_model."
        return blip2_table(self, source) + self.lm.published("huggingface").under("lm.", root)
