"""Prompts without their padding, beams and streams: each is what the plain way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import pictures, text_ids

from mmkernels import models
from mmkernels.layers.decoder import BlockConfig, Decoder, DecoderConfig
from mmkernels.models import MultimodalModel, Tokens, weights
from mmkernels.models.packing import PackedPrompts


class Words(MultimodalModel):
    """A language model alone."""

    def __init__(self, lm: Decoder, tokens: Tokens) -> None:
        super().__init__()
        self.lm, self.tokens = lm, tokens


def _words(**changes: object) -> Words:
    torch.manual_seed(0)
    block = BlockConfig(
        32, 4, 64, kv_heads=2, activation="swiglu", norm="rms", qkv_bias=False, out_bias=False, mlp_bias=False, eps=1e-5
    )  # fmt: skip
    config = DecoderConfig("llama", block, 2, 40, std=0.3, **changes)  # type: ignore[arg-type]
    return Words(Decoder(config).requires_grad_(False), Tokens(image=4, end_of_chunk=3, end_of_text=1, pad=0))


def _padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    length = torch.tensor([[3], [12], [5]])
    place = torch.arange(12)
    mask = place >= 12 - length if side == "left" else place < length
    return torch.where(mask, ids, 0), mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned"])
def test_packed_prompts_give_what_each_gives_alone(side, positions):
    model = _words(positions=positions, window=6 if positions == "rotary" else None)
    ids, mask = _padded(side)
    together = model.generate(None, ids, mask, max_new_tokens=6, stop=())
    for row, keep, answer in zip(ids, mask, together, strict=True):
        alone = model.generate(None, row[keep].unsqueeze(0), max_new_tokens=6, stop=())
        assert torch.equal(alone[0], answer)


@torch.no_grad()
def test_a_packed_prompt_fills_the_cache_as_a_padded_one(monkeypatch):
    model = _words()
    ids, mask = _padded("left")
    packed, plain = model.new_cache(3, 14), model.new_cache(3, 14)
    found = model(None, ids, mask, cache=packed, last_only=True).logits
    monkeypatch.setattr(PackedPrompts, "of", classmethod(lambda *_: None))
    expected = model(None, ids, mask, cache=plain, last_only=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    valid = mask[None, :, :, None, None]
    for a, b in ((packed.text.k, plain.text.k), (packed.text.v, plain.text.v)):
        torch.testing.assert_close(a[:, :, :12] * valid, b[:, :, :12] * valid, rtol=1e-5, atol=1e-5)
    assert packed.text.length == 12 and torch.equal(packed.text.start, plain.text.start)


def test_padding_is_dropped_only_where_that_saves_something():
    cache = _words().new_cache(2, 10).text
    mask = torch.ones(2, 10, dtype=torch.bool)
    assert PackedPrompts.of(mask, cache) is None and PackedPrompts.of(None, cache) is None
    mask[0, :5] = False
    assert PackedPrompts.of(mask, None) is None
    assert PackedPrompts.of(mask, cache) is not None
    cache.length = 1
    assert PackedPrompts.of(mask, cache) is None


def test_flamingo_packs_what_its_blocks_see(model):
    ids = text_ids(".....IaIb", "IabcdefIc", "......abI")
    mask = ids != 0
    images = pictures(3, 2)
    together = model.generate(images, ids, mask, max_new_tokens=5, stop=())
    for n in range(3):
        alone = model.generate(images[n : n + 1], ids[n][mask[n]].unsqueeze(0), max_new_tokens=5, stop=())
        assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_beams_find_what_transformers_finds(beams, length_penalty):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.4, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs: Any = transformers.LlamaForCausalLM(config).eval()
    ours = _words()
    weights.load(ours.lm, theirs.state_dict(), source="llama")
    ids, mask = _padded("left")
    options = {"num_beams": beams, "do_sample": False, "length_penalty": length_penalty}
    expected = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=8, **options)[:, 12:]
    found = ours.generate(
        None, ids, mask, max_new_tokens=8, stop=(1,), beams=beams, length_penalty=length_penalty
    )
    ended = (
        (expected == 1).cumsum(1) - (expected == 1).int()
    ) > 0  # they repeat the end where a row has ended
    assert torch.equal(found, expected.masked_fill(ended, 0))


def test_a_beam_of_one_prompt_does_not_depend_on_its_neighbours():
    model = _words()
    ids, mask = _padded("left")
    together = model.generate(None, ids, mask, max_new_tokens=7, beams=3, stop=(7, 9, 11))
    for row, keep, answer in zip(ids, mask, together, strict=True):
        alone = model.generate(None, row[keep].unsqueeze(0), max_new_tokens=7, beams=3, stop=(7, 9, 11))
        assert torch.equal(alone[0], answer[: alone.shape[1]]) and not answer[alone.shape[1] :].any()


def test_more_beams_than_tokens_are_searched_too():
    model = _words()
    answer = model.generate(None, torch.tensor([[5, 6]]), max_new_tokens=3, beams=50, stop=(1,))
    assert answer.shape[0] == 1 and 1 <= answer.shape[1] <= 3


def test_a_stream_hears_every_step():
    model, heard = _words(), []
    ids, mask = _padded("left")
    answer = model.generate(None, ids, mask, max_new_tokens=6, stop=(), on_token=heard.append)
    assert torch.equal(torch.stack(heard, 1), answer)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beams": 0}, "beams: got 0"),
        ({"beams": 2, "temperature": 0.5}, "beams: got 2 beside a temperature"),
        ({"beams": 2, "on_token": print}, "beams: got 2 beside on_token"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ],
)
def test_options_that_contradict_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        _words().generate(None, torch.tensor([[5]]), **options)
    with pytest.raises(TypeError, match="num_beams"):
        _words().generate(None, torch.tensor([[5]]), num_beams=2)


@pytest.mark.parametrize("name", ["blip2-tiny", "blip2-t5-tiny", "cogvlm-tiny", "flamingo-tiny"])
def test_one_beam_of_many_is_no_worse_than_the_greedy_answer(name):
    torch.manual_seed(3)
    model: Any = models.build(name).eval()
    size = model.config.vision.image_size
    images = torch.randn(2, 1, 3, size, size)
    ids, mask = model.expand(torch.tensor([[model.tokens.image, 20, 21], [model.tokens.image, 30, 31]]))
    greedy = model.generate(images, ids, mask, max_new_tokens=4, stop=())
    found = model.generate(images, ids, mask, max_new_tokens=4, stop=(), beams=4)
    assert found.shape == greedy.shape
    assert (
        _likelihood(model, images, ids, mask, found) >= _likelihood(model, images, ids, mask, greedy) - 1e-4
    ).all()


@torch.no_grad()
def _likelihood(model, images, ids, mask, answer) -> torch.Tensor:
    """The sum of an answer's log-probabilities, from one pass over the whole."""
    if hasattr(model.lm, "encode"):
        logits = model(images, ids, mask, labels=answer).logits
    else:
        seen = None if mask is None else torch.cat([mask, torch.ones_like(answer, dtype=torch.bool)], 1)
        logits = model(images, torch.cat([ids, answer], 1), seen).logits[:, -answer.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, answer.unsqueeze(2)).sum((1, 2))
