"""Which tokens are the vision expert's, where tokens stand, and which keys they see: metadata all layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.visual_expert import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

TYPES = (torch.int64, torch.int32, torch.bool)


def _check_types(token_types: Tensor, image_length: int) -> None:
    wrong = (token_types != 0) & (token_types != 1)
    if bool(wrong.any()):
        at = int(wrong.flatten().to(torch.uint8).argmax())
        raise ValueError(
            f"token_types: token {at % token_types.shape[1]} of row {at // token_types.shape[1]} has type "
            f"{int(token_types.flatten()[at])}, expected 0 (text) or 1 (vision)"
        )
    if image_length:
        ones = (token_types == 1).int()
        runs = (ones * reference._place_in_run(ones == 1) + ones)[
            (ones == 1) & (torch.nn.functional.pad(ones[:, 1:], (0, 1)) == 0)
        ]
        wrong_run = runs[runs % (image_length + 2) != 0]
        if len(wrong_run):
            raise ValueError(
                f"token_types: got a run of {int(wrong_run[0])} vision tokens, expected a multiple of "
                f"image_length + 2 = {image_length + 2}"
            )


def _check_runs(key_mask: Tensor, rows: int) -> None:
    starts = (key_mask[:, 1:] & ~key_mask[:, :-1]).sum(1) + key_mask[:, :1].sum(1)
    if bool((starts > 1).any()):
        row = int((starts > 1).to(torch.uint8).argmax())
        raise ValueError(f"key_mask: row {row} has a hole, expected one run of keys in each row")


EXPERT_MASK = Op(
    "expert_mask(Tensor token_types, int image_length) -> Tensor",
    reference.expert_mask,
    fake=lambda token_types, image_length: token_types.new_empty(token_types.shape, dtype=torch.bool),
    check=_check_types,
)
IMAGE_POSITIONS = Op(
    "image_positions(Tensor token_types, Tensor? mask, int image_length) -> Tensor",
    reference.image_positions,
    fake=lambda token_types, mask, image_length: token_types.new_empty(token_types.shape, dtype=torch.int64),
    check=lambda token_types, mask, image_length: _check_types(token_types, image_length),
)
CAUSAL_RUNS = Op(
    "causal_runs(Tensor key_mask, int rows) -> (Tensor lo, Tensor hi)",
    reference.causal_runs,
    fake=lambda key_mask, rows: tuple(
        key_mask.new_empty((key_mask.shape[0], rows), dtype=torch.int32) for _ in "lh"
    ),
    check=_check_runs,
)


def _check_arguments(token_types: Tensor, image_length: int | None) -> int:
    _check.shapes(token_types=(token_types, "B L"))
    _check.dtypes(TYPES, token_types=token_types)
    if image_length is not None:
        _check.positive(image_length=image_length)
    return image_length or 0


def expert_mask(token_types: Tensor, *, image_length: int | None = None) -> Tensor:
    """Which tokens go to the vision expert: `v[i] = (t[i] = 1) and (t[i + 1] = 1)`, never the last one of a row.

    Begin-of-image and patches are vision's; end-of-image, though its type is 1, is text's, as are a 1 that stands alone and the
    last token of a run that reaches the end of the row: a single token being decoded is text's always.

    **Shapes** token_types `[B, L]`, 0 text and 1 vision; the result likewise. **Dtypes** int64, int32, bool in; bool out.
    **Gradient** none. **Edge** images that touch are one run and only the last one's end is text's, as in the published Hugging
    Face code; with `image_length` (an image's patches, without begin and end) every image has its end, as in the training code.
    **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for types beside 0 and 1 and for runs that
    are no multiple of `image_length + 2`; TypeError for dtypes.
    **Source** CogVLM (arXiv 2311.03079) and its code. **Speed** metadata, made once a forward pass, no host sync.
    """
    return EXPERT_MASK(token_types, _check_arguments(token_types, image_length))


def image_positions(
    token_types: Tensor, mask: Tensor | None = None, *, image_length: int | None = None
) -> Tensor:
    """Rotary positions in which all patches of an image share one: `BOS boi p .. p eoi text` is 0, 1, 2 .. 2, 3, 4 ...

    **Shapes** token_types `[B, L]`, 0 text and 1 vision; mask `[B, L]`, 0 or False at padding; the result `[B, L]`.
    **Dtypes** int64, int32, bool in; int64 out. **Gradient** none.
    **Edge** padding repeats the position before it; padding right before an image is not seen as its edge, so begin-of-image
    then shares the patches' position, as published. Images that touch are one run; with `image_length` each has positions of
    its own and padding counts on, as in the training code (no mask then).
    **Raises** ValueError for shapes, a mask beside `image_length`, and for values as `expert_mask`; TypeError for dtypes.
    **Source** CogVLM (arXiv 2311.03079) and its code. **Speed** metadata, made once a forward pass, no host sync.
    """
    length = _check_arguments(token_types, image_length)
    if mask is not None:
        _check.shapes(token_types=(token_types, "B L"), mask=(mask, "B L"))
        _check.dtypes(TYPES, mask=mask)
        if length:
            raise ValueError(
                "mask: got one beside image_length, expected None: that convention counts padding on"
            )
        mask = mask != 0
    return IMAGE_POSITIONS(token_types, mask, length)


def causal_runs(key_mask: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """lo, hi int32 `[B, rows]` of causal attention with key padding: the last `rows` of the `[B, keys]` tokens are queries.

    Raises ValueError on CPU (elsewhere with MMKERNELS_CHECK=1) for a row whose valid keys are not one run.
    """
    _check.shapes(key_mask=(key_mask, "B K"))
    if rows > key_mask.shape[1]:
        raise ValueError(
            f"key_mask: got {key_mask.shape[1]} keys for {rows} tokens, expected at least as many"
        )
    return CAUSAL_RUNS(key_mask, rows)
