"""Low-rank updates are the published computation on the rows they belong to, and nothing before they are trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmkernels.layers.decoder import BlockConfig, Decoder, DecoderConfig
from mmkernels.layers.lora import LoraConfig, LoraLinear, add_lora

BLOCK = BlockConfig(16, 4, 24, kv_heads=2, activation="swiglu", norm="rms", mlp_bias=False)
CONFIG = DecoderConfig("llama", BLOCK, layers=2, vocab=30)


def linear(parts: tuple[int, ...], tuned: tuple[bool, ...], **options) -> LoraLinear:
    torch.manual_seed(0)
    made = LoraLinear(6, parts, tuned, bias=True, config=LoraConfig(3, 6.0, **options)).double()
    torch.nn.init.normal_(made.lora_up)
    return made


def test_an_update_is_the_published_one_on_its_own_rows() -> None:
    made = linear((4, 5, 2), (True, False, True))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = F.linear(x, made.weight, made.bias)
    a, b = made.lora_down.split(3), made.lora_up.split((4, 2))
    expected[..., :4] += 2 * (x @ a[0].T @ b[0].T)
    expected[..., 9:] += 2 * (x @ a[1].T @ b[1].T)
    torch.testing.assert_close(made(x), expected)
    assert torch.autograd.gradcheck(made, x.requires_grad_())


def test_dropout_is_before_the_update_and_only_in_training() -> None:
    made = linear((4,), (True,), dropout=1.0)
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))  # all of the update's input is dropped
    made.eval()
    assert not torch.allclose(made(x), F.linear(x, made.weight, made.bias))


def test_a_decoder_with_fresh_updates_is_the_decoder() -> None:
    torch.manual_seed(0)
    plain, tuned = Decoder(CONFIG), Decoder(CONFIG)
    add_lora(tuned, LoraConfig(2, 2, targets=("q", "v", "out", "up", "down")))
    state = plain.state_dict()
    missing, left = tuned.load_state_dict(state, strict=False)
    assert not left and all(".lora_" in name for name in missing) and len(missing) == 2 * 2 * 4
    shapes = {name: tuple(p.shape) for name, p in tuned.blocks[0].named_parameters() if "lora" in name}
    assert shapes == {
        "attention.qkv.lora_down": (4, 16), "attention.qkv.lora_up": (24, 2), "attention.out.lora_down": (2, 16),
        "attention.out.lora_up": (16, 2), "mlp.up.lora_down": (4, 16), "mlp.up.lora_up": (48, 2),
        "mlp.down.lora_down": (2, 24), "mlp.down.lora_up": (16, 2),
    }  # fmt: skip
    x = torch.randn(1, 5, 16)
    seen = plain.visibility(None, plain.positions(None, (1, 5), None), None)
    assert torch.equal(tuned.blocks[1](x, seen), plain.blocks[1](x, seen))


def test_bad_configs_are_named() -> None:
    with pytest.raises(ValueError, match="rank: got 0"):
        LoraConfig(0, 1)
    with pytest.raises(ValueError, match="targets: got 'ffn'"):
        LoraConfig(1, 1, targets=("ffn",))
    with pytest.raises(ValueError, match="targets: got 0"):
        LoraConfig(1, 1, targets=())
    decoder = Decoder(CONFIG)
    add_lora(decoder, LoraConfig(1, 1))
    with pytest.raises(ValueError, match="decoder: got one whose blocks have LoRA already"):
        add_lora(decoder, LoraConfig(1, 1))
