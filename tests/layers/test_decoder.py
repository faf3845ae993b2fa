"""The decoder: cache, padding, windows and the rows that are trained apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels.layers import BlockConfig, Decoder, DecoderConfig

BLOCK = BlockConfig(32, 4, 48, kv_heads=2)
CONFIGS = {
    "rotary": DecoderConfig("llama", BLOCK, 2, 20, rotary_fraction=0.5),
    "alibi": DecoderConfig("mpt", BLOCK, 2, 20, positions="alibi", tied=True),
    "learned": DecoderConfig("mpt", BLOCK, 2, 20, positions="learned", max_positions=16, position_offset=2),
    "window": DecoderConfig("llama", BLOCK, 2, 20, window=3),
    "parallel": DecoderConfig("llama", replace(BLOCK, parallel=True, qk_norm="head"), 2, 20),
}


def _decoder(name: str, special: tuple[int, ...] = ()) -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIGS[name], special)


def _run(lm: Decoder, ids, mask=None, cache=None):
    positions = lm.positions(mask, tuple(ids.shape), cache)
    if cache is not None and cache.length == 0 and mask is not None:
        cache.start.copy_(mask.to(torch.int8).argmax(1))
    seen = lm.visibility(mask, positions, cache)
    x = lm.add_positions(lm.embed(ids), positions)
    for n, block in enumerate(lm.blocks):
        x = block(x, seen, cache, n)
    if cache is not None:
        cache.length += ids.shape[1]
    return lm.logits(x)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_steps_equal_the_whole(name):
    lm, ids = _decoder(name), torch.randint(0, 20, (2, 9))
    whole, cache = _run(lm, ids), lm.new_cache(2, 9)
    parts = [_run(lm, part, cache=cache) for part in ids.split((4, 1, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at most 9"):
        _run(lm, ids[:, :1], cache=cache)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_changes_nothing(name, side):
    lm, ids = _decoder(name), torch.randint(0, 20, (1, 5))
    alone = _run(lm, ids)
    longer, mask = torch.randint(0, 20, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    place = slice(4, 9) if side == "left" else slice(0, 5)
    longer[1, place], mask[1] = ids[0], False
    mask[1, place] = True
    torch.testing.assert_close(_run(lm, longer, mask)[1, place], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padded_prompts_continue_from_a_cache():
    lm, ids = _decoder("rotary"), torch.randint(0, 20, (1, 6))
    padded, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool)
    padded[0], padded[1, 3:], mask[1, :3] = ids[0], ids[0, :3], False
    cache, more = lm.new_cache(2, 9), torch.randint(0, 20, (1, 3))
    _run(lm, padded, mask, cache)
    last = _run(lm, more.expand(2, -1), None, cache)
    alone = _run(lm, torch.cat([ids[:, :3], more], 1))
    torch.testing.assert_close(last[1], alone[0, 3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_hides_what_is_further_back():
    lm, ids = _decoder("window"), torch.randint(0, 20, (1, 9))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 20
    a, b = _run(lm, ids), _run(lm, other)  # two layers of window 3 reach back four tokens
    assert torch.equal(a[:, 5:], b[:, 5:]) and not torch.equal(a[:, 4], b[:, 4])


@pytest.mark.parametrize("name", ["alibi", "rotary"])
def test_special_rows_stand_for_their_rows(name):
    lm, ids = _decoder(name, special=(7, 3)), torch.tensor([[1, 3, 7, 2, 7, 3, 3]])
    with torch.no_grad():
        plain = _decoder(name)
        plain.load_state_dict({k: v for k, v in lm.state_dict().items() if k != "special_rows"})
        plain.embedding.weight[[7, 3]] = lm.special_rows
    torch.testing.assert_close(_run(lm, ids), _run(plain, ids))
    for model in (lm, plain):
        _run(model, ids)[..., [1, 3, 7]].square().sum().backward()
    torch.testing.assert_close(lm.special_rows.grad, plain.embedding.weight.grad[[7, 3]])
    assert not lm.embedding.weight.grad[[7, 3]].any()


def test_unknown_kinds_are_refused():
    for change, match in (({"positions": "sinus"}, "positions"), ({"block": replace(BLOCK, norm="batch")}, "norm"),
                          ({"block": replace(BLOCK, activation="sin")}, "activation"),
                          ({"block": replace(BLOCK, qk_norm="row")}, "qk_norm")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Decoder(replace(CONFIGS["rotary"], **change))
