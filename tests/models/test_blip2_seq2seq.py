"""BLIP-2 before an encoder-decoder: sizes, answers token by token, candidates; and a conversation's labels."""

from __future__ import annotations

import pytest
import torch

from mmkernels import models
from mmkernels.layers import T5Config
from mmkernels.models.qformer import rank_candidates, turn_labels

# transformers' counts of the same configurations, and the untied head of 32,128 x width that it leaves out
HUGGINGFACE = {
    "blip2-flan-t5-xl": 3_876_648_448 + 32_128 * 2048,
    "blip2-flan-t5-xxl": 12_098_000_384 + 32_128 * 4096,
    "instructblip-flan-t5-xl": 3_957_170_176 + 32_128 * 2048,
    "instructblip-flan-t5-xxl": 12_178_522_112 + 32_128 * 4096,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tiny = models.config("blip2-tiny")
    lm = T5Config(48, 8, 4, 64, layers=2, decoder_layers=2, vocab=512)
    made = models.build(
        models.Blip2Seq2SeqConfig(tiny.vision, tiny.qformer, lm, tiny.tokens, tiny.stages[2:])
    )
    return made.eval()


@pytest.fixture
def batch(model):
    short = torch.tensor([[2, 70, 71], [2, 72, 0]])
    ids, mask = model.expand(short, short != 0)
    return torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), ids, mask


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_presets_have_the_published_size(name):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    assert abs(sum(p.numel() for p in model.parameters()) / HUGGINGFACE[name] - 1) < 1e-3


@torch.no_grad()
def test_generation_is_what_the_forward_pass_likes_best(model, batch):
    answer = model.generate(*batch, max_new_tokens=4, stop=())
    logits = model(*batch, labels=answer).logits
    assert torch.equal(logits.argmax(-1), answer)
    other = (batch[0].flip(0), *batch[1:])
    assert not torch.allclose(model(*other, labels=answer).logits, logits)


@torch.no_grad()
def test_ranking_is_the_plain_sum_with_the_end_of_text(model, batch):
    candidates = [[80, 81, 82], [83], [84, 85]]
    for segments in (1, 2):
        found = rank_candidates(
            model, batch[0], batch[1], candidates, prompt_mask=batch[2], n_segments=segments
        )
        for n, candidate in enumerate(candidates):
            labels = torch.tensor([[*candidate, 1]]).expand(2, -1)
            logs = model(*batch, labels=labels).logits.log_softmax(-1)
            sums = -logs.gather(2, labels.unsqueeze(2)).sum((1, 2))
            torch.testing.assert_close(found.losses[:, n], sums, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.order, found.losses.argsort(1))


def test_bad_input_is_named(model, batch):
    with pytest.raises(ValueError, match="cache: got one"):
        model(*batch, cache=models.Cache(None))
    with pytest.raises(ValueError, match="input_ids: got ids 512 to 512"):
        model(input_ids=torch.full((1, 2), 512))


def test_turns():
    """7 ends the human's turn, 8 the assistant's, 9 the text; two tokens call the assistant."""
    rows = (
        [4, 4, 7, 5, 5, 6, 6, 8, 4, 7, 5, 5, 6, 9, 0, 0],
        [4, 7, 5, 5, 6, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
    )
    labels = turn_labels(torch.tensor(rows), asked=7, answered=8, end=9, opening=2)
    n = -100
    assert labels.tolist() == [
        [n, n, n, n, n, 6, 6, 8, n, n, n, n, 6, 9, n, n],
        [n, n, n, n, 6, 8, *[n] * 10],
    ]
