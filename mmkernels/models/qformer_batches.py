"""Ids, masks and labels of batches: answers behind their prompts, and conversations."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.models.base import IGNORE
from mmkernels.primitives import _check


def instruction_batch(
    prompt_ids: Tensor, prompt_mask: Tensor | None, answer_ids: Tensor, answer_mask: Tensor | None, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts `[B, P]` and answers `[B, A]` (without BOS, with what ends them) as one batch: ids, mask and labels `[B, P + A]`.

    Each row is its prompt's tokens, its answer's tokens, then all padding; labels are -100 everywhere but at the answer.
    **Source** InstructBLIP's batches for Vicuna.
    """
    _check.shapes(
        prompt_ids=(prompt_ids, "B P"), prompt_mask=(prompt_mask, "B P"), answer_ids=(answer_ids, "B A"),
        answer_mask=(answer_mask, "B A"),
    )  # fmt: skip
    _check.dtypes((torch.bool,), prompt_mask=prompt_mask, answer_mask=answer_mask)
    masks = [
        torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        for ids, mask in ((prompt_ids, prompt_mask), (answer_ids, answer_mask))
    ]
    ids, mask = torch.cat([prompt_ids, answer_ids], 1), torch.cat(masks, 1)
    labels = torch.cat([torch.full_like(prompt_ids, IGNORE), torch.where(masks[1], answer_ids, IGNORE)], 1)
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    return torch.where(mask, ids.gather(1, order), pad), mask, labels.gather(1, order).where(mask, IGNORE)


def instruction_labels(input_ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
    """Labels of ids `[B, T]` whose answers begin at the positions `[B]`: -100 before them and on padding."""
    _check.shapes(input_ids=(input_ids, "B T"), mask=(mask, "B T"), answers=(answers, "B"))
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(mask & (position >= answers.unsqueeze(1)), input_ids, IGNORE)


def turn_labels(input_ids: Tensor, *, asked: int, answered: int, end: int, opening: int = 5) -> Tensor:
    """Labels of a conversation `[B, T]`: -100 on what the human says, and after the end of text, which is kept itself.

    `asked` ends a human's turn; it and the `opening` tokens behind it, which call the assistant, are the human's too.
    `answered` ends the assistant's. Without an end of text, what follows the last answer is cut short: -100.
    **Source** InternLM-XComposer, whose ids are 103027, 103028 and 2.
    """
    _check.shapes(input_ids=(input_ids, "B T"))
    labels = input_ids.clone()
    for row, ids in zip(labels, input_ids.tolist(), strict=True):
        begun, question, answer, ended = 0, 0, 0, False
        for i, token in enumerate(ids):
            if token == asked:
                row[begun : i + 1 + opening] = IGNORE
                begun, question = i + 1 + opening, i
            elif token == answered:
                begun, answer = i + 1, i
            elif token == end:
                row[i + 1 :] = IGNORE
                ended = True
                break
        if not ended and answer > question:
            row[answer + 1 :] = IGNORE
    return labels
