"""T5 alone: cached steps, padding, rows that see nothing, bounded scores, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import weights
from mmkernels.layers import T5, T5Config
from mmkernels.layers import biased_attention as attention
from mmkernels.models import seq2seq

CONFIG = T5Config(24, 8, 4, 48, 2, 2, 40, buckets=8, max_distance=12)


def _model(dtype=torch.float64, **changes) -> T5:
    torch.manual_seed(0)
    return T5(replace(CONFIG, **changes)).to(dtype)


def _inputs(rows: int = 2, length: int = 11):
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[0, 7:] = False
    return torch.randn(rows, length, 24, dtype=torch.float64), mask, torch.randint(0, 40, (rows, 10))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_cached_steps_equal_the_whole(tied):
    lm = _model(tied=tied)
    x, mask, ids = _inputs()
    states, cache = lm.encode(x, mask), lm.new_cache(2, 10)
    whole, parts = lm.decode(ids, states, mask), []
    for n, part in enumerate(ids.split((4, 1, 3, 2), dim=1)):
        parts.append(lm.decode(part, *((states, mask) if n == 0 else (None, None)), cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.length == 10
    with pytest.raises(ValueError, match="at most 10"):
        lm.decode(ids[:, :1], None, cache=cache)


def test_padding_changes_nothing_and_is_never_read():
    lm = _model()
    x, mask, ids = _inputs()
    alone = lm.decode(ids[:1], lm.encode(x[:1, :7]))
    x[0, 7:] = torch.nan
    x.requires_grad_()
    logits = lm.decode(ids, lm.encode(x, mask), mask)
    torch.testing.assert_close(logits[:1], alone)
    logits.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in lm.parameters())]
    assert all(bool(g.isfinite().all()) for g in gradients) and not x.grad[0, 7:].any()


def test_a_row_without_states_looks_at_nothing():
    lm = _model()
    x, mask, ids = _inputs()
    mask[0] = False
    states = lm.encode(x, mask)
    logits = lm.decode(ids, states, mask)
    with torch.no_grad():
        for block in lm.decoder.blocks:
            block.cross_out.weight.zero_()
    torch.testing.assert_close(logits[0], lm.decode(ids, states, mask)[0], rtol=0, atol=0)


def test_scores_are_bounded(monkeypatch):
    """Backward too: between the chunks of rows only queries, keys, values and results are kept."""
    b, h, t, d = 2, 4, 64, 8
    q, k, v = (torch.randn(b * h, t, d, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(h, 2 * t - 1, dtype=torch.float64, requires_grad=True)
    arguments, mask = (q, k, v, bias), torch.rand(b, t) > 0.3
    weight, kept = torch.randn(b * h, t, d, dtype=torch.float64), []
    gradients, outputs = [], []
    for scores in (attention.SCORES, 6 * b * h * t):
        monkeypatch.setattr(attention, "SCORES", scores)
        kept.append(0)

        def keep(x):
            kept[-1] = max(kept[-1], x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs.append(attention.biased_attention(q, k, v, h, bias=bias, mask=mask))
        gradients.append(torch.autograd.grad((outputs[-1] * weight).sum(), arguments))
    torch.testing.assert_close(outputs[1], outputs[0])
    for a, b_ in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b_)
    assert kept[0] >= b * h * t * t and kept[1] < b * h * t * t // 2


@torch.no_grad()
def test_half_precision_follows():
    lm, exact = _model(torch.bfloat16), _model()
    x, mask, ids = _inputs()
    exact.load_state_dict(lm.state_dict())
    got = lm.decode(ids, lm.encode(x.bfloat16(), mask), mask)
    assert got.dtype == torch.bfloat16
    expected = exact.decode(ids, exact.encode(x.bfloat16().double(), mask), mask)
    torch.testing.assert_close(got.double(), expected, rtol=0.05, atol=0.1)


def test_answers_stop_row_by_row():
    lm = _model()
    x, mask, _ = _inputs()
    free = seq2seq.generate(lm, x, mask, max_new_tokens=6, stop=())
    assert free.shape == (2, 6)
    end = int(free[0, 2])
    first = free[0].tolist().index(end)
    stopped = seq2seq.generate(lm, x[:1], mask[:1], max_new_tokens=6, stop=(end,), pad=7)
    assert stopped[0].tolist() == free[0, : first + 1].tolist()
    both = seq2seq.generate(lm, x, mask, max_new_tokens=6, stop=(end,), pad=39)
    assert both[0, : first + 1].tolist() == stopped[0].tolist() and bool((both[0, first + 1 :] == 39).all())
    with pytest.raises(ValueError, match="max_new_tokens"):
        seq2seq.generate(lm, x, mask, max_new_tokens=0)


def test_what_the_decoder_reads():
    labels = torch.tensor([[5, 6, 1, -100], [7, 1, -100, -100]])
    assert seq2seq.decoder_inputs(labels).tolist() == [[0, 5, 6, 1], [0, 7, 1, 0]]
    assert float(seq2seq.target_loss(torch.randn(1, 2, 5), torch.full((1, 2), -100))) == 0


def test_bad_input_is_named():
    lm = _model()
    x, mask, ids = _inputs()
    states = lm.encode(x, mask)
    for call, match in (
        (lambda: lm.encode(x[..., :23]), "inputs_embeds"),
        (lambda: lm.encode(x, mask[:, :4]), "attention_mask"),
        (lambda: lm.decode(ids, None), "states: got None"),
        (lambda: lm.decode(ids[:1], states), "states"),
        (lambda: lm.decode(ids + 40, states), "decoder_input_ids: got ids"),
        (lambda: lm.decode(ids, states, mask, lm.new_cache(2, 10)), "cache"),
        (lambda: _model(activation="relu"), "activation"),
        (lambda: _model(layers=0), "layers"),
        (lambda: weights.load(lm, {}, source="google"), "source"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="attention_mask"):
        lm.encode(x, mask.long())
    cache = lm.new_cache(2, 10)
    with torch.no_grad():
        lm.decode(ids, states, mask, cache)
        with pytest.raises(ValueError, match="states: got a tensor"):
            lm.decode(ids, states, mask, cache)
