"""Visual tokens into the text's sequence: schema, gradient, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.sliced_image import reference
from mmkernels.primitives import _check
from mmkernels.primitives._op import Op

_INPUTS = "Tensor tokens, Tensor visual, Tensor? special, Tensor index"


def _fake_forward(tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:3], rest[-1]
    return tuple(
        t.new_empty(t.shape) if need and t is not None else inputs[0].new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _check_forward(tokens: Tensor, visual: Tensor, special: Tensor | None, index: Tensor) -> None:
    least = -1 if special is None else -1 - special.shape[0]
    wrong = (index < least) | (index >= visual.shape[0])
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"positions: token {row} asks for row {int(index[row])}, expected {least} to {visual.shape[0] - 1}"
        )


FORWARD = Op(
    f"splice_embeddings({_INPUTS}) -> Tensor", reference.splice, fake=_fake_forward, check=_check_forward
)
BACKWARD = Op(
    f"splice_embeddings_backward(Tensor dout, {_INPUTS}, bool[] needs) -> "
    "(Tensor dtokens, Tensor dvisual, Tensor dspecial)",
    reference.splice_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = BACKWARD(dout, *ctx.saved_tensors, needs)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None


FORWARD.autograd(_backward, _setup)
BACKWARD.not_twice_differentiable()


def splice_embeddings(
    token_embeddings: Tensor, visual: Tensor, positions: Tensor, *, special: Tensor | None = None
) -> Tensor:
    """Visual tokens, separators and text as one sequence, in one pass.

    `out[t] = visual[i]` where `i = positions[t] >= 0`, `token_embeddings[t]` where it is -1, `special[-2 - i]` below.

    **Shapes** token_embeddings `[B, T, C]`, or packed `[T, C]`; visual `[V, C]`, of all pictures; special `[E, C]`, learned
    rows such as LLaVA-NeXT's newline, which -2, -3, ... name. positions is one of: integers like the tokens (`[B, T]`), the
    visual row of each token; bool like the tokens, True where the next visual row goes, as many as V; integers `[V]`, where
    each visual row goes among the `B T` tokens, -1 for nowhere. Integers as many as the tokens are always the first form.
    Returns out like token_embeddings.
    **Dtypes** float32, bfloat16, float16, float64, each its own: visual and special are rounded to token_embeddings'. positions
    int64, int32, bool. **Gradient** token_embeddings, visual, special; a row that is used twice gets the sum, in order;
    deterministic; once differentiable. **Edge** no visual rows: the text as it is; a replaced token gets no gradient.
    **Raises** ValueError for shapes, and on CPU (elsewhere with MMKERNELS_CHECK=1) for rows that are not there, for places
    taken twice and for a number of True that is not V; TypeError for dtypes and devices. Kernels keep the token there.
    **Source** LLaVA (arXiv 2304.08485); Fuyu's scatter. **Speed** `mmkernels bench --op splice_embeddings`.
    """
    tokens = token_embeddings
    if not isinstance(tokens, Tensor) or tokens.dim() not in (2, 3):
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"token_embeddings: got {got}, expected [B, T, C] or [T, C]")
    _check.shapes(visual=(visual, f"V {tokens.shape[-1]}"), special=(special, f"E {tokens.shape[-1]}"))
    for name, value in {"token_embeddings": tokens, "visual": visual, "special": special}.items():
        _check.dtypes(_check.FLOATS, **{name: value})
    _check.dtypes((torch.int64, torch.int32, torch.bool), positions=positions)
    _check.devices(token_embeddings=tokens, visual=visual, positions=positions, special=special)
    index = _index(positions, tokens.shape[:-1], visual.shape[0])
    return FORWARD(tokens.flatten(0, -2), visual, special, index).view(tokens.shape)


def _index(positions: Tensor, shape: torch.Size, rows: int) -> Tensor:
    """The first form of `positions`, flat [B T]."""
    looks = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if positions.shape == shape and positions.dtype != torch.bool:
        return positions.flatten()
    if positions.shape == shape:
        place = positions.flatten()
        if looks and int(place.sum()) != rows:
            raise ValueError(
                f"positions: got {int(place.sum())} places, expected one for each of {rows} visual rows"
            )
        return torch.where(place, place.cumsum(0) - 1, -1)
    if positions.shape != (rows,) or positions.dtype == torch.bool:
        raise ValueError(
            f"positions: got shape {tuple(positions.shape)}, expected {list(shape)} like the tokens or [{rows}] like visual"
        )
    tokens = shape.numel()
    if looks:
        _check_places(positions, tokens)
    each = torch.arange(rows, device=positions.device)
    place = torch.where((positions >= 0) & (positions < tokens), positions, tokens).long()
    return each.new_full((tokens + 1,), -1).scatter(0, place, each)[:-1]


def _check_places(positions: Tensor, tokens: int) -> None:
    kept = positions[positions != -1]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= tokens):
        raise ValueError(
            f"positions: got places {int(kept.min())} to {int(kept.max())}, expected 0 to {tokens - 1}, or -1"
        )
    if len(kept.unique()) != len(kept):
        raise ValueError(
            f"positions: got {len(kept)} rows into {len(kept.unique())} places, expected distinct places"
        )
