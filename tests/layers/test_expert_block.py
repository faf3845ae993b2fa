"""CogVLM's layer against the published form: outputs, gradients, weights, caches, and what it refuses."""

from __future__ import annotations

from typing import Any

import published_cogvlm as published
import pytest
import torch
from torch import Tensor

from mmkernels import weights
from mmkernels.layers import (
    KVCache,
    VisualExpertAttention,
    VisualExpertBlock,
    VisualExpertMLP,
    image_positions,
    rotary_table,
)

WIDTH, HEADS, HIDDEN = 32, 4, 40
RELEASES: dict[str, dict[str, Any]] = {
    "cogvlm": {"kv": 4, "bias": False, "base": 1e4},
    "cogvlm2": {"kv": 2, "bias": True, "base": 5e5, "eps": 1e-5},
}
TYPES = torch.tensor([
    [0, 1, 1, 1, 1, 1, 0, 0, 0, 0],  # BOS, an image, text
    [0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
    [0, 1, 1, 1, 1, 1, 1, 0, 1, 0],  # images that touch, one that stands alone
    [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],  # up to the end of the row
])  # fmt: skip


def _pair(release: str, dtype: torch.dtype = torch.float64, mode: str = "fp32") -> tuple[Any, Any]:
    """The published layer and ours with its weights."""
    torch.manual_seed(0)
    options = RELEASES[release]
    theirs = published.Layer(WIDTH, HEADS, hidden=HIDDEN, in_model_dtype=mode == "model_dtype", **options)
    for norm in (theirs.input_layernorm, theirs.post_attention_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    theirs = theirs.to(dtype)
    ours = VisualExpertBlock(
        WIDTH, HEADS, HIDDEN, kv_heads=options["kv"], vision_bias=options["bias"], rotary_base=options["base"],
        eps=options.get("eps", 1e-6), table_mode=mode,
    ).to(dtype)  # fmt: skip
    weights.load(ours, theirs.state_dict(), source=release)
    return theirs, ours


def _x(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *TYPES.shape, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


def _grads(module: torch.nn.Module, run: Any, x: Tensor) -> tuple[Any, Any, dict[str, Any]]:
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_outputs_and_gradients_are_those_of_the_published_layer(release: str, part: str) -> None:
    theirs, ours = _pair(release)
    inside = {
        "block": (theirs, ours),
        "attention": (theirs.self_attn, ours.attention),
        "mlp": (theirs.mlp, ours.mlp),
    }
    a, b = inside[part]
    where = image_positions(TYPES)
    rest = (TYPES,) if part == "mlp" else (TYPES, where)
    y, dx, grads = _grads(a, lambda x: a(x, *rest), _x())
    z, dz, own = _grads(b, lambda x: b(x, TYPES, where), _x())
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(dz, dx)
    with torch.no_grad():  # gradients are laid out as weights are: a table moves them too
        moved = {"block": VisualExpertBlock, "attention": VisualExpertAttention, "mlp": VisualExpertMLP}[part]
        assert isinstance(b, moved)
        named = {
            n: torch.zeros_like(p) if grads.get(n) is None else grads[n] for n, p in a.named_parameters()
        }
        weights.load(b, named, source=release)
    for name, parameter in b.named_parameters():
        torch.testing.assert_close(own[name], parameter.detach(), msg=lambda m, n=name: f"{n}: {m}")


def _left_and_right(length: int) -> Tensor:
    """Padding on the left of one row, on the right of another; one row is padding altogether."""
    mask = torch.ones(len(TYPES), length, dtype=torch.bool)
    mask[1, :3] = mask[2, -2:] = False
    return mask


@pytest.mark.parametrize("release", RELEASES)
def test_padded_keys_are_not_seen(release: str) -> None:
    theirs, ours = _pair(release)
    mask = _left_and_right(TYPES.shape[1])
    types = TYPES * mask
    where, x = image_positions(types, mask), _x()
    y = theirs(x, types, where, mask)
    poisoned = torch.where(mask.unsqueeze(-1), x, 1e4)
    for given in (mask, mask.long()):
        z = ours(poisoned, types, where, key_mask=given)
        torch.testing.assert_close(z[mask], y[mask])
    assert torch.isfinite(ours(x, types, where, key_mask=torch.zeros_like(mask))).all()


@pytest.mark.parametrize("mode", ["fp32", "model_dtype"])
def test_in_bfloat16_the_table_is_the_published_one(mode: str) -> None:
    theirs, ours = _pair("cogvlm", torch.bfloat16, mode)
    _, other = _pair("cogvlm", torch.bfloat16, "fp32" if mode == "model_dtype" else "model_dtype")
    x, where = (
        2 * _x(torch.bfloat16),
        image_positions(TYPES) + 500,
    )  # there bfloat16 tells every fourth number
    same, found, wrong = (m(x, TYPES, where) for m in (theirs.self_attn, ours.attention, other.attention))
    assert found.dtype == torch.bfloat16
    near, far = ((t.double() - same.double()).abs().mean() for t in (found, wrong))
    assert near < 2**-8 * same.double().abs().max() and far > 4 * near


def test_a_table_in_the_models_dtype_rounds_every_step() -> None:
    where = torch.tensor([[1, 255, 256, 257, 300]])
    cos, sin = rotary_table(where, 8, 1e4, torch.bfloat16)
    frequency = (1.0 / 1e4 ** (torch.arange(0, 8, 2).float() / 8)).bfloat16()
    angle = where.bfloat16()[..., None] * frequency
    assert torch.equal(cos[:, :, 0], angle.cos()) and torch.equal(sin[:, :, 0], angle.sin())
    assert torch.equal(cos[:, 2], cos[:, 3]) and not torch.equal(cos[:, 1], cos[:, 2])
    wide = rotary_table(where, 8, 1e4, torch.float32)
    assert not torch.equal(wide[0][:, 2], wide[0][:, 3])


def test_a_cache_continues_the_text() -> None:
    _, ours = _pair("cogvlm2")
    types = TYPES[:3].clone()
    types[:, 7:] = 0
    where, x = image_positions(types), _x()[:3]
    whole = ours(x, types, where)
    parts = [slice(0, 7), slice(7, 8), slice(8, 10)]
    shape = (1, 3, 10, 2, WIDTH // HEADS)
    kept: Any = KVCache(shape, dtype=torch.float64, device=torch.device("cpu"))
    pair: Any = None
    for own in parts:
        given = (x[:, own], types[:, own], where[:, own])
        y, pair = ours(*given, cache=pair, return_cache=True)
        z, same = ours(*given, cache=kept, return_cache=True)
        kept.length += own.stop - own.start
        torch.testing.assert_close(y, whole[:, own])
        torch.testing.assert_close(z, whole[:, own])
        assert same is kept
    assert pair[0].shape == shape[1:]


def test_what_layers_share_is_made_once() -> None:
    _, ours = _pair("cogvlm")
    where, x = image_positions(TYPES), _x()
    shared = ours.attention.share(x, TYPES, where)
    assert torch.equal(ours(x, shared=shared), ours(x, TYPES, where))
    torch.testing.assert_close(ours.mlp(x, groups=shared.groups), ours.mlp(x, TYPES))


def _training_state(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The published layer's tensors under the training code's names."""
    text, rotary, mlp = f"transformer.layers.{layer}.", "mixins.rotary.vision_", "mixins.mlp."
    names = {
        "self_attn.language_expert_query_key_value.weight": f"{text}attention.query_key_value.weight",
        "self_attn.language_expert_dense.weight": f"{text}attention.dense.weight",
        "self_attn.vision_expert_query_key_value.weight": f"{rotary}query_key_value_list.{layer}.weight",
        "self_attn.vision_expert_dense.weight": f"{rotary}dense_list.{layer}.weight",
        "mlp.language_mlp.gate_proj.weight": f"{mlp}gate_proj.{layer}.weight",
        "mlp.language_mlp.up_proj.weight": f"{text}mlp.dense_h_to_4h.weight",
        "mlp.language_mlp.down_proj.weight": f"{text}mlp.dense_4h_to_h.weight",
        "mlp.vision_mlp.gate_proj.weight": f"{mlp}vision_gate_proj.{layer}.weight",
        "mlp.vision_mlp.up_proj.weight": f"{mlp}vision_dense_h_to_4h_list.{layer}.weight",
        "mlp.vision_mlp.down_proj.weight": f"{mlp}vision_dense_4h_to_h_list.{layer}.weight",
        "input_layernorm.weight": f"{text}input_layernorm.weight",
        "post_attention_layernorm.weight": f"{text}post_attention_layernorm.weight",
    }
    return {names[key]: value for key, value in state.items() if key in names}


@pytest.mark.parametrize("layer", [0, 7])
def test_the_training_codes_names_load_too(layer: int) -> None:
    theirs, ours = _pair("cogvlm")
    other = VisualExpertBlock(WIDTH, HEADS, HIDDEN, layer=layer).double()
    weights.load(other, _training_state(theirs.state_dict(), layer), source="cogvlm_sat")
    for name, value in ours.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    part = VisualExpertMLP(WIDTH, HIDDEN, layer=layer).double()
    state = _training_state({k: v for k, v in theirs.state_dict().items() if k.startswith("mlp")}, layer)
    weights.load(part, state, source="cogvlm_sat")
    assert torch.equal(part.up.vision.weight, ours.mlp.up.vision.weight)


def test_vision_starts_as_a_copy_of_text() -> None:
    _, ours = _pair("cogvlm2")
    ours.copy_text_to_vision()
    where, x = image_positions(TYPES), _x()
    torch.testing.assert_close(ours(x, TYPES, where), ours(x, torch.zeros_like(TYPES), where))
    assert not ours.attention.qkv.vision.bias.any()


@pytest.mark.parametrize("unused", ["vision", "text"])
def test_an_expert_without_tokens_gets_zero_gradients(unused: str) -> None:
    _, ours = _pair("cogvlm2")
    types = torch.zeros_like(TYPES) if unused == "vision" else torch.ones_like(TYPES)
    part = ours.mlp if unused == "text" else ours  # a row's last token is always text's
    x = _x()
    if unused == "text":
        groups = ours.attention.share(x, TYPES, image_positions(TYPES)).groups
        order = torch.arange(TYPES.numel(), dtype=torch.int32)
        groups = groups._replace(counts=torch.tensor([0, TYPES.numel()], dtype=torch.int32), order=order)
        y = part(x, groups=groups)
    else:
        y = part(x, types, image_positions(types))
    y.sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (f".{unused}." not in f".{name}"), name


def test_bad_input_is_refused_by_name() -> None:
    _, block = _pair("cogvlm")
    x, where = _x(), image_positions(TYPES)
    attention = block.attention
    for error, match, call in (
        (ValueError, "token_types: token 1 of row 0 has type 2", lambda: block(x, TYPES * 2, where)),
        (ValueError, "token_types: got shape", lambda: block(x, TYPES[:, :5], where)),
        (ValueError, "positions: got shape", lambda: block(x, TYPES, where[:2])),
        (TypeError, "positions: got torch.float", lambda: block(x, TYPES, where.float())),
        (TypeError, "token_types: got torch.float", lambda: block(x, TYPES.float(), where)),
        (ValueError, "x: got shape", lambda: block(x[..., :5], TYPES, where)),
        (ValueError, "token_types: got None", lambda: block(x)),
        (ValueError, "token_types: got None", lambda: block.mlp(x)),
        (ValueError, "key_mask: row 0 has a hole", lambda: block(x, TYPES, where, key_mask=TYPES == 0)),
        (ValueError, "key_mask: got shape", lambda: block(x, TYPES, where, key_mask=(TYPES == 0)[:, :5])),
        (ValueError, "rows", lambda: block.mlp(x[:2], groups=attention.share(x, TYPES, where).groups)),
        (TypeError, "x|w_text", lambda: block.mlp(x.float(), TYPES)),
        (ValueError, "heads: got 5", lambda: VisualExpertAttention(32, 5)),
        (ValueError, "kv_heads: got 3", lambda: VisualExpertAttention(32, 4, kv_heads=3)),
        (ValueError, "head_dim: got 3", lambda: VisualExpertAttention(12, 4)),
        (ValueError, "table_mode", lambda: VisualExpertAttention(32, 4, table_mode="half")),
        (ValueError, "hidden", lambda: VisualExpertMLP(32, 0)),
        (ValueError, "source", lambda: weights.load(block, {}, source="llava")),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
