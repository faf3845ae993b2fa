"""Fuyu against Hugging Face's: patches, logits, loss and every gradient of a small one, and its own size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import models, weights
from mmkernels.models.fuyu import FuyuConfig, PatchEmbedding, patchify

transformers = pytest.importorskip("transformers")
TOLERANCE = {torch.float64: 3e-6, torch.float32: 5e-5}  # theirs takes softmax and angles in float32
PATCH, IMAGE, NEWLINE = 6, 30, 31


def _small() -> FuyuConfig:
    config = models.config("fuyu-8b")
    assert isinstance(config, FuyuConfig)
    block = replace(config.lm.block, width=48, heads=6, hidden=64)
    lm = replace(config.lm, block=block, layers=2, vocab=40)
    tokens = replace(config.tokens, image=IMAGE, end_of_chunk=32)
    return replace(config, patch=PATCH, canvas=(48, 48), lm=lm, tokens=tokens, newline=NEWLINE, answer=32)


def _theirs(dtype: torch.dtype) -> torch.nn.Module:
    text = {
        "model_type": "persimmon", "vocab_size": 40, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 6, "max_position_embeddings": 64, "qk_layernorm": True, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 25e3, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    config = transformers.FuyuConfig(
        text_config=text, patch_size=PATCH, image_token_id=IMAGE, attn_implementation="eager"
    )
    model = transformers.FuyuForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def _newer(key: str) -> str:
    return key


def _older(key: str) -> str:
    """As the released file has its keys."""
    key = key.replace("model.vision_embed_tokens.", "vision_embed_tokens.")
    key = key.replace("model.language_model.", "language_model.model.")
    return "language_model.lm_head.weight" if key == "lm_head.weight" else key


def test_their_defaults_are_ours():
    theirs = transformers.FuyuConfig().get_text_config()
    config = models.config("fuyu-8b")
    assert isinstance(config, FuyuConfig)
    b = config.lm.block
    assert (b.width, b.heads, b.hidden, config.lm.layers, config.lm.vocab) == (
        theirs.hidden_size, theirs.num_attention_heads, theirs.intermediate_size, theirs.num_hidden_layers,
        theirs.vocab_size,
    )  # fmt: skip
    assert b.eps == theirs.layer_norm_eps and theirs.qk_layernorm and config.lm.max_positions == 16_384
    assert theirs.rope_parameters["partial_rotary_factor"] == config.lm.rotary_fraction


@pytest.mark.parametrize("release", [_newer, _older], ids=["newer", "released"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_forward_and_gradients(dtype, release):
    torch.manual_seed(0)
    theirs, ours = _theirs(dtype), models.build(_small()).to(dtype).train()
    state = {release(k): v for k, v in theirs.state_dict().items()}
    weights.load(ours, state, source="fuyu")
    tolerance = TOLERANCE[dtype]
    pixels = torch.randn(2, 3, 12, 18, dtype=dtype)
    runs = [ours.run(2, 3)] * 2
    prompt = torch.tensor([[IMAGE, 1, 5, 6, 32, 7, 8], [IMAGE, 1, 9, 10, 11, 32, 12]])
    ids, mask = ours.expand(prompt, runs=runs)
    assert ids.shape == (2, 2 * 4 + 6) and mask.all()
    labels = torch.where((ids == IMAGE) | (ids == NEWLINE), -100, ids)
    got = ours(pixels, ids, labels=labels)
    # theirs takes patches with the channels running fastest
    patches = torch.stack([_hand(p) for p in pixels])
    torch.testing.assert_close(patches, patchify(pixels, PATCH))
    want = theirs(input_ids=ids, pixel_values=patches, labels=labels)
    torch.testing.assert_close(got.logits, want.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.loss, want.loss, rtol=tolerance, atol=tolerance, check_dtype=False)
    got.loss.backward()
    want.loss.backward()
    table, gradients = ours.published("fuyu"), {release(k): p.grad for k, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        ways = [(r, keys) for r in table.rules if (keys := r.sources(name)) is not None]
        rule, keys = next(way for way in ways if all(key in gradients for key in way[1]))
        expected = rule.value([gradients[key] for key in keys])
        torch.testing.assert_close(parameter.grad, expected, rtol=10 * tolerance, atol=tolerance)


def _hand(picture: torch.Tensor) -> torch.Tensor:
    """Patch by patch, number by number."""
    rows = []
    for y in range(0, picture.shape[1], PATCH):
        for x in range(0, picture.shape[2], PATCH):
            rows.append(
                torch.stack(
                    [picture[c, y + i, x + j] for i in range(PATCH) for j in range(PATCH) for c in range(3)]
                )
            )
    return torch.stack(rows)


def test_left_padding_and_pictures_of_two_sizes():
    theirs, ours = _theirs(torch.float32), models.build(_small()).eval()
    weights.load(ours, theirs.state_dict(), source="fuyu")
    pictures = [torch.randn(3, 12, 6), torch.randn(3, 6, 24)]
    ids, mask = ours.expand(
        torch.tensor([[IMAGE, 1, 5], [IMAGE, 1, 5]]), runs=[ours.run(2, 1), ours.run(1, 4)]
    )
    with torch.no_grad():
        both = ours(pictures, ids, mask).logits
        for n, picture in enumerate(pictures):
            row = ids[n][mask[n]][None]
            want = theirs(input_ids=row, pixel_values=patchify(picture, PATCH)[None]).logits[0]
            torch.testing.assert_close(both[n][mask[n]], want, rtol=1e-4, atol=1e-4)
            left = torch.cat([torch.zeros(1, 3, dtype=row.dtype), row], 1)
            seen = torch.arange(left.shape[1])[None] >= 3
            padded = ours(picture[None], left, seen).logits[0, 3:]
            torch.testing.assert_close(padded, want, rtol=1e-4, atol=1e-4)


def test_the_patch_layer_loads_alone():
    theirs = _theirs(torch.float32)
    for rename in (_newer, _older):
        layer = PatchEmbedding(PATCH, 48)
        weights.load(layer, {rename(k): v for k, v in theirs.state_dict().items()}, source="fuyu")
        assert torch.equal(layer.weight, theirs.model.vision_embed_tokens.weight)
    weights.load(layer, theirs.model.vision_embed_tokens.state_dict(), source="fuyu")
    pixels = torch.randn(2, 3, 12, 18)
    torch.testing.assert_close(layer(pixels), layer(patchify(pixels, PATCH)))
