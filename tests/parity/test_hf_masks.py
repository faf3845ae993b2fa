"""Masks as runs of keys: found exactly or left to torch, and what `AttentionInterface` gets is right for each."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmkernels.integrations import hf
from mmkernels.integrations.hf import _attention, _experts, _masks
from mmkernels.integrations.hf._attention import REASONS, attention

ROWS = 7


@pytest.fixture(autouse=True)
def _ours(monkeypatch):
    """However small: these are the sizes at which torch would be asked."""
    monkeypatch.setattr(_attention, "SMALL", 0)
    monkeypatch.setattr(_attention, "_skips_little", lambda *_: False)
    monkeypatch.setattr(_experts, "_torch_wins", lambda *_: False)


class Module(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2


def _qkv(rows=ROWS, keys=ROWS, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    return [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in shapes]


def _same(mask, keys=ROWS, rows=ROWS, valid=None, learns=True, **kwargs):
    """Ours and torch's over one mask: outputs and gradients, on rows that see something."""
    found = []
    theirs_mask = kwargs.pop("theirs", mask)
    for function, given in ((attention, mask), (sdpa_attention_forward, theirs_mask)):
        q, k, v = (x.requires_grad_(learns) for x in _qkv(rows, keys))
        out = function(Module(), q, k, v, given, scaling=0.3, **kwargs)[0]
        out = out if valid is None else out * valid[:, :, None, None]
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        found.append([out, *(torch.autograd.grad(loss, (q, k, v)) if learns else ())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def _padding(*lengths, left):
    mask = torch.arange(ROWS) < torch.tensor(lengths).unsqueeze(1)
    return mask.flip(1) if left else mask


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_causal_text_is_intervals(left):
    valid = _padding(7, 4, left=left)
    mask = _masks.interval_mask(
        2, ROWS, ROWS, mask_function=masking_utils.causal_mask_function, attention_mask=valid
    )
    assert mask.dtype == torch.int32 and mask.shape == (2, 1, ROWS, 2)
    theirs = masking_utils.sdpa_mask(
        batch_size=2,
        q_length=ROWS,
        kv_length=ROWS,
        mask_function=masking_utils.causal_mask_function,
        attention_mask=valid,
    )
    _same(mask, theirs=theirs, valid=valid)


@pytest.mark.parametrize("offset", [0, 3, torch.tensor(3)], ids=["prefill", "later", "static"])
def test_a_cache_longer_than_the_text(offset):
    """A static cache: 12 places, 3 filled before these rows; what is not filled yet is not seen."""
    arguments = {
        "batch_size": 2,
        "q_length": 4,
        "kv_length": 12,
        "q_offset": offset,
        "allow_is_causal_skip": False,
    }
    arguments["mask_function"] = masking_utils.causal_mask_function
    theirs = masking_utils.sdpa_mask(**arguments)
    ours = _masks.interval_mask(**{**arguments, "allow_is_causal_skip": True})
    assert _masks.is_intervals(ours)
    _same(ours, theirs=theirs, rows=4, keys=12)


def test_nothing_hidden_is_no_mask():
    whole = torch.ones(2, ROWS, dtype=torch.bool)
    assert _masks.interval_mask(2, ROWS, ROWS, attention_mask=whole) is None
    assert _masks.interval_mask(2, 1, ROWS, q_offset=ROWS - 1, attention_mask=whole) is None
    bidirectional = {
        "mask_function": masking_utils.bidirectional_mask_function,
        "allow_is_bidirectional_skip": True,
    }
    assert _masks.interval_mask(2, ROWS, 3, attention_mask=whole[:, :3], **bidirectional) is None
    _same(None)


def test_patterns_come_as_their_own_mask_and_are_read():
    window = masking_utils.sliding_window_causal_mask_function(3)
    mask = _masks.interval_mask(2, ROWS, ROWS, mask_function=window, local_size=3)
    assert mask.dtype == torch.bool
    _same(mask)
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [1] * 7]).bool()
    mask = _masks.interval_mask(
        2, ROWS, ROWS, attention_mask=holes, mask_function=masking_utils.causal_mask_function
    )
    assert mask.dtype == torch.bool and len(_masks.seen(mask, ROWS, ROWS).runs) == 3
    _same(mask, valid=holes)


def _additive(visible, floor=None):
    floor = torch.finfo(torch.float32).min if floor is None else floor
    return torch.zeros(visible.shape).masked_fill(~visible, floor)


def test_additive_masks_and_rows_that_hide_everything():
    visible = torch.rand(2, 1, ROWS, ROWS, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[0, 0, 2] = False  # an average of all values, as softmax makes of equal scores
    mask = _additive(visible)
    found = _masks.seen(mask, ROWS, ROWS)
    assert found.uniform[0, 2] and not found.reason
    REASONS.clear()
    _same(mask, learns=False)
    assert not hf.explain()
    _same(mask)  # their autograd gives such a row's scores a gradient: theirs it is
    assert hf.explain() == {"gradients of rows whose additive mask hides every key": 1}
    assert _masks.seen(mask, ROWS, ROWS) is found  # read once
    mask[0, 0, 2, 1] = 0.0
    assert _masks.seen(mask, ROWS, ROWS) is not found  # written to
    _same(mask)


def test_what_is_no_run_goes_to_torch_with_its_reason():
    random = torch.Generator().manual_seed(2)
    bias = torch.randn(2, 1, ROWS, ROWS, generator=random)
    comb = (torch.arange(12) % 2 == 0).expand(2, 1, ROWS, 12).clone()
    comb[0, 0, 0] = True  # not the same for every row: keys cannot be put in another order for all
    heads = torch.rand(2, 4, ROWS, ROWS, generator=random) < 0.7
    heads[..., 0] = True
    for mask, reason, keys in (
        (bias, "a mask that adds a bias", ROWS),
        (comb, "rows that see 6 separate runs of keys, more than 4", 12),
        (heads, "a mask for every head of its own", ROWS),
    ):
        REASONS.clear()
        _same(mask, keys=keys)
        assert hf.explain() == {reason: 1}


def test_keys_hidden_from_every_row_are_put_last():
    comb = (torch.arange(12) % 2 == 0).expand(2, 1, ROWS, 12)
    assert _masks.seen(comb, ROWS, 12).order is not None
    _same(comb, keys=12)


def test_what_changes_the_result_and_is_not_computed_is_an_error():
    q, k, v = _qkv()
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f'{name}: got .* expected None with attention "mmkernels"'):
            attention(Module(), q, k, v, None, **{name: torch.ones(4)})


def test_dropout_is_drawn_by_torchs_generator():
    q, k, v = _qkv()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(attention(Module(), q, k, v, None, dropout=0.5)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
