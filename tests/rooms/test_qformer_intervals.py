"""The Q-Former's masks against the published table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import interval_attention, qformer_intervals

QUERIES, TEXT = 3, 5
MASKS = {
    "full": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "both and holes": [[0, 1, 1, 0, 0], [1, 0, 1, 0, 1]],
    "one sample empty": [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]],
}
MODES = ("itc", "itg", "itm", "instruct")


def _published(mode: str, mask: Tensor) -> Tensor:
    """bool [B, R, R]: the table of the four blocks, written out densely."""
    b, length = mask.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    valid = mask[:, None, :].expand(b, length, length)
    seen = torch.zeros(b, QUERIES + length, QUERIES + length, dtype=torch.bool)
    seen[:, :QUERIES, :QUERIES] = True
    seen[:, :QUERIES, QUERIES:] = mask[:, None, :] & torch.tensor(mode in ("itm", "instruct"))
    seen[:, QUERIES:, :QUERIES] = mode != "itc"
    seen[:, QUERIES:, QUERIES:] = valid & causal if mode == "itg" else valid
    return seen


def _seen(found: Any) -> Tensor:
    """The same from intervals: key j is seen by row r iff its place in the order lies in r's interval."""
    place = found.order.argsort(1)[:, None, :]
    return (place >= found.lo[..., None]) & (place < found.hi[..., None])


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("mode", MODES)
def test_intervals_are_the_published_masks(mode: str, padding: str) -> None:
    mask = torch.tensor(MASKS[padding], dtype=torch.bool)
    found = qformer_intervals(mode, QUERIES, mask)
    assert torch.equal(_seen(found), _published(mode, mask))
    assert torch.equal(found.order.sort(1).values, torch.arange(QUERIES + TEXT).expand(2, -1))
    lo, hi = found.in_order()
    for b in range(2):
        assert torch.equal(lo[b], found.lo[b, found.order[b]]) and torch.equal(
            hi[b], found.hi[b, found.order[b]]
        )


@pytest.mark.parametrize(("queries", "length"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_text_alone_and_queries_alone(mode: str, queries: int, length: int) -> None:
    found = qformer_intervals(mode, queries, torch.ones(2, length, dtype=torch.bool))
    causal = (
        torch.ones(length, length, dtype=torch.bool).tril() if mode == "itg" else torch.ones(length, length)
    )
    expected = causal.bool() if queries == 0 else torch.ones(queries, queries, dtype=torch.bool)
    assert torch.equal(_seen(found), expected.expand(2, -1, -1))


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("padding", ["left", "right", "both and holes"])
@pytest.mark.parametrize("mode", MODES)
def test_attention_over_the_intervals_is_masked_attention(mode: str, padding: str, poison: float) -> None:
    mask = torch.tensor(MASKS[padding], dtype=torch.bool)
    q, k, v = torch.randn(3, 2, 4, QUERIES + TEXT, 8, generator=torch.Generator().manual_seed(0)).unbind()
    scores = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(~_published(mode, mask)[:, None], -1e4)
    expected = scores.softmax(-1) @ v
    found = qformer_intervals(mode, QUERIES, mask)
    hidden = torch.cat([torch.ones(2, QUERIES, dtype=torch.bool), mask], 1)[:, None, :, None]
    order = found.order[:, None, :, None].expand_as(k)
    k, v = (torch.where(hidden, x, poison).gather(2, order) for x in (k, v))
    torch.testing.assert_close(interval_attention(q, k, v, found.lo, found.hi), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("mlm", 3, torch.ones(1, 2, dtype=torch.bool)),
            ValueError,
            "mode: got 'mlm', expected one of 'itc'",
        ),
        (
            ("itm", -1, torch.ones(1, 2, dtype=torch.bool)),
            ValueError,
            "num_query: got -1, expected 0 or more",
        ),
        (
            ("itm", 3, torch.ones(2, dtype=torch.bool)),
            ValueError,
            r"text_mask: .*expected 2 dimensions \[B, L\]",
        ),
        (
            ("itm", 3, torch.ones(1, 2, dtype=torch.int64)),
            TypeError,
            "text_mask: got torch.int64, expected torch.bool",
        ),
    ],
)
def test_qformer_intervals_names_its_bad_arguments(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qformer_intervals(*arguments)


def test_qformer_intervals_is_an_operator() -> None:
    mask = torch.tensor(MASKS["left"], dtype=torch.bool)
    torch.library.opcheck(torch.ops.mmkernels.qformer_intervals.default, (mask, QUERIES, False, True))
    compiled = torch.compile(
        lambda m: qformer_intervals("itg", QUERIES, m), backend="aot_eager", fullgraph=True
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(compiled(mask), qformer_intervals("itg", QUERIES, mask), strict=True)
    )
