"""Which tokens are whose, where they stand, and what the expert's linear map refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mmkernels import expert_mask, expert_mlp, image_positions, modality_linear, route_groups
from mmkernels.ops.visual_expert import causal_runs


def _types(*rows: str) -> Tensor:
    return torch.tensor([[int(t) for t in row] for row in rows])


@pytest.mark.parametrize(("types", "vision", "places"), [
    ("0111100", "0111000", [0, 1, 2, 2, 3, 4, 5]),  # BOS boi p p eoi text
    ("00100", "00000", [0, 1, 2, 3, 4]),  # a token that stands alone
    ("0110", "0100", [0, 1, 2, 3]),  # no patch
    ("00111", "00110", [0, 1, 2, 3, 4]),  # up to the end of the row: its last token is text's
    ("0011111", "0011110", [0, 1, 2, 3, 3, 3, 4]),
    ("11110", "11100", [0, 1, 1, 2, 3]),  # from the start
    ("01111110", "01111100", [0, 1, 2, 2, 2, 2, 3, 4]),  # two images of two patches that touch are one
    ("0111011100", "0110011000", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ("1", "0", [0]),  # decoding
    ("0", "0", [0]),
    ("1111", "1110", [0, 1, 1, 2]),
])  # fmt: skip
def test_masks_and_positions_as_published(types: str, vision: str, places: list[int]) -> None:
    for dtype in (torch.int64, torch.int32, torch.bool):
        rows = _types(types).to(dtype)
        assert torch.equal(expert_mask(rows), _types(vision).bool())
        assert image_positions(rows).tolist() == [places]


@pytest.mark.parametrize(("types", "mask", "places"), [
    ("00011110", "00111111", [0, 0, 1, 2, 3, 3, 4, 5]),  # text between the padding and the image
    ("00011110", "00011111", [0, 0, 0, 0, 0, 0, 1, 2]),  # right before it: begin-of-image is no edge
    ("01111000", "11111100", [0, 1, 2, 2, 3, 4, 4, 4]),
    ("01111000", "11111000", [0, 1, 2, 2, 2, 2, 2, 2]),  # right after it: end-of-image is none either
])  # fmt: skip
def test_padding_repeats_a_position_and_is_no_edge(types: str, mask: str, places: list[int]) -> None:
    for dtype in (torch.int64, torch.bool):
        assert image_positions(_types(types), _types(mask).to(dtype)).tolist() == [places]


def _published(u: tuple[int, ...]) -> list[int]:
    """Token by token; -1 is padding."""
    last, w = len(u) - 1, list(u)
    for i, t in enumerate(u):
        if t == 1 and (i == 0 or u[i - 1] == 0 or i == last or u[i + 1] == 0):
            w[i] = 0
    found = [0]
    for i in range(1, len(u)):
        found.append(found[-1] + int(w[i] == 0 or (w[i] == 1 and w[i - 1] == 0)))
    return found


def test_positions_of_all_short_rows_are_the_published_ones() -> None:
    rows = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)))
    found = image_positions(rows.clamp(min=0), rows >= 0).tolist()
    assert found == [_published(tuple(row)) for row in rows.tolist()]


@pytest.mark.parametrize(("types", "vision", "places"), [
    ("0111100", "0111000", [0, 1, 2, 2, 3, 4, 5]),
    ("0111111110", "0111011100", [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]),  # images that touch stay apart
    ("11110", "11100", [0, 1, 1, 2, 3]),
    ("01111", "01110", [0, 1, 2, 2, 3]),
    ("0000", "0000", [0, 1, 2, 3]),  # padding on the right counts on
])  # fmt: skip
def test_the_training_codes_convention_keeps_images_apart(types: str, vision: str, places: list[int]) -> None:
    assert torch.equal(expert_mask(_types(types), image_length=2), _types(vision).bool())
    assert image_positions(_types(types), image_length=2).tolist() == [places]


def test_one_image_is_the_same_in_both_conventions() -> None:
    rows = _types("0111111000", "0001111110")
    assert torch.equal(expert_mask(rows), expert_mask(rows, image_length=4))
    assert torch.equal(image_positions(rows), image_positions(rows, image_length=4))


def test_causal_runs_are_the_valid_keys_up_to_a_row() -> None:
    mask = _types("0011", "1100", "1111", "0000", "0110").bool()
    for rows in (4, 2, 0):
        lo, hi = causal_runs(mask, rows)
        key, row = torch.arange(4), torch.arange(4 - rows, 4)
        seen = (key >= lo[..., None]) & (key < hi[..., None])
        assert torch.equal(seen, mask[:, None] & (key <= row[:, None]))
        assert bool((hi >= lo).all()) and lo.dtype == hi.dtype == torch.int32


def test_bad_input_is_refused_by_name() -> None:
    x, w = torch.randn(5, 4), torch.randn(6, 4)
    vision = torch.tensor([True, False, True, False, False])
    groups = route_groups(vision)
    for error, match, call in (
        (ValueError, "token_types: token 2 of row 1 has type 3", lambda: expert_mask(_types("000", "013"))),
        (ValueError, "token_types: token 0 of row 0 has type -1", lambda: image_positions(torch.tensor([[-1]]))),
        (ValueError, "token_types: got shape", lambda: expert_mask(torch.tensor([0, 1]))),
        (TypeError, "token_types: got torch.float", lambda: expert_mask(torch.zeros(1, 2))),
        (ValueError, "mask: got shape", lambda: image_positions(_types("01"), _types("011"))),
        (ValueError, "mask: got one", lambda: image_positions(_types("01"), _types("01"), image_length=2)),
        (ValueError, "image_length: got 0", lambda: expert_mask(_types("01"), image_length=0)),
        (ValueError, "run of 3 vision tokens, expected a multiple of image_length \\+ 2 = 4",
         lambda: expert_mask(_types("01110"), image_length=2)),
        (ValueError, "key_mask: row 1 has a hole", lambda: causal_runs(_types("011", "101").bool(), 2)),
        (ValueError, "key_mask: got 3 keys for 4", lambda: causal_runs(_types("011").bool(), 4)),
        (ValueError, "w_vision: got shape", lambda: modality_linear(x, vision, w, w[:5])),
        (ValueError, "w_text: got shape", lambda: modality_linear(x, vision, w[:, :3], w)),
        (ValueError, "b_vision: got shape", lambda: modality_linear(x, vision, w, w, None, w[0])),
        (ValueError, "is_vision: got shape", lambda: modality_linear(x, vision[:4], w, w)),
        (ValueError, "is_vision: got 2 groups of 5 rows, expected 2 groups of x's 4",
         lambda: modality_linear(x[:4], groups, w, w)),
        (ValueError, "is_vision: got 3 groups", lambda: modality_linear(x, route_groups(vision.int(), 3), w, w)),
        (ValueError, "counts: got 3 text and 3 vision rows", lambda: modality_linear(
            x, groups._replace(counts=torch.tensor([3, 3], dtype=torch.int32)), w, w)),
        (ValueError, "gather: got places 0 to 5", lambda: modality_linear(
            x, groups._replace(order=torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32)), w, w)),
        (ValueError, "residual: got shape", lambda: modality_linear(x, vision, w, w, residual=x)),
        (ValueError, "w_text: got 5 rows", lambda: modality_linear(x, vision, w[:5], w[:5], activation="swiglu")),
        (ValueError, "activation", lambda: modality_linear(x, vision, w, w, activation="tanh")),
        (TypeError, "is_vision: got torch.int64", lambda: modality_linear(x, vision.long(), w, w)),
        (TypeError, "w_vision: got torch.float64", lambda: modality_linear(x, vision, w, w.double())),
        (TypeError, "residual: got torch.float64",
         lambda: modality_linear(x, vision, w, w, residual=torch.zeros(5, 6).double())),
        (ValueError, "x: got shape", lambda: expert_mlp(x[0], vision, (w, w), (w, w))),
        (ValueError, "up_vision: got shape", lambda: expert_mlp(x, vision, (w, w.T), (w.T, w.T))),
        (ValueError, "down: got 6 columns", lambda: expert_mlp(x, vision, (w, w), (w.T, w.T))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
