"""Against Hugging Face's T5 in the form of FlanT5: logits, every gradient, padding, decoding, and the published sizes."""

from __future__ import annotations

import pytest
import torch

from mmkernels import weights
from mmkernels.layers import T5, T5Config
from mmkernels.models import seq2seq

transformers = pytest.importorskip("transformers")
TOLERANCE = {torch.float64: 3e-6, torch.float32: 5e-5}  # theirs takes norms in float32
ACTIVATIONS = {"gelu": "gated-gelu_python", "gelu_tanh": "gated-gelu"}


def _pair(dtype, activation: str = "gelu_tanh", tied: bool = False) -> tuple[T5, torch.nn.Module]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
        feed_forward_proj=ACTIVATIONS[activation], tie_word_embeddings=tied, decoder_start_token_id=0,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).to(dtype).eval()
    if not tied:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(40, 24, dtype=dtype) / 5)
    ours = T5(T5Config(24, 8, 4, 48, 2, 3, 40, buckets=8, max_distance=12, activation=activation, tied=tied))
    return ours.to(dtype), theirs


def _inputs(dtype, rows: int = 3):
    """Embeddings with padding on the right, on the left with a hole, and none; tokens for the decoder."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(rows, 19, dtype=torch.bool)
    mask[0, 12:] = False
    mask[1, :5] = mask[1, 9:11] = False
    x = torch.randn(rows, 19, 24, generator=generator, dtype=dtype)
    return x, mask, torch.randint(0, 40, (rows, 17), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("activation", "tied"), [("gelu", False), ("gelu_tanh", False), ("gelu", True)])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_logits_and_gradients(agree, monkeypatch, chunked, activation, tied, dtype):
    if chunked:  # five query rows at a time, then the rest
        monkeypatch.setattr("mmkernels.layers.biased_attention.SCORES", 5 * 3 * 4 * 19)
    ours, theirs = _pair(dtype, activation, tied)
    x, mask, ids = _inputs(dtype)
    agree(
        ours, theirs, "huggingface",
        lambda e: ours.decode(ids, ours.encode(e, mask), mask),
        lambda e: theirs(inputs_embeds=e, attention_mask=mask.long(), decoder_input_ids=ids).logits,
        (x,), tolerance=TOLERANCE[dtype],
    )  # fmt: skip


@torch.no_grad()
def test_generation():
    ours, theirs = _pair(torch.float32)
    weights.load(ours, theirs.state_dict(), source="huggingface")
    x, mask, _ = _inputs(torch.float32)
    got = seq2seq.generate(ours, x, mask, max_new_tokens=9)
    expected = theirs.generate(  # without its cache, which wants as many layers in both stacks
        inputs_embeds=x, attention_mask=mask.long(), max_new_tokens=9, do_sample=False, use_cache=False
    )
    assert torch.equal(got, expected[:, 1:])
    assert len(set(got.flatten().tolist())) > 3  # more than one token over and over


def test_loss():
    ours, theirs = _pair(torch.float64)
    weights.load(ours, theirs.state_dict(), source="huggingface")
    x, mask, labels = _inputs(torch.float64)
    labels[0, 9:] = -100
    logits = ours.decode(seq2seq.decoder_inputs(labels), ours.encode(x, mask), mask)
    expected = theirs(inputs_embeds=x, attention_mask=mask.long(), labels=labels).loss
    torch.testing.assert_close(seq2seq.target_loss(logits, labels), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets(both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    from mmkernels.layers.biased_attention import relative_buckets

    distance = torch.arange(-3000, 3000)
    for buckets, far in ((32, 128), (8, 12), (16, 500)):
        expected = T5Attention._relative_position_bucket(distance, both_ways, buckets, far)
        assert torch.equal(relative_buckets(distance, buckets, far, both_ways=both_ways), expected)
