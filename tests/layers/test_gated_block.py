"""The gated block against the rules of the published code, written out densely here: every edge case, exact zeros, leaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.layers import GatedCrossAttentionBlock, project_media_all

IMAGES, LATENTS = 3, 4


def _bools(*rows: str) -> Tensor:
    return torch.tensor([[c == "I" for c in row] for row in rows])


TEXTS = {
    "usual": _bools("tItttItt", "IttItttI"),
    "adjacent": _bools("IIttIttt", "tIIItttt"),
    "no_image": _bools("tttttttt", "tttItttt"),  # one row without, beside one with
    "none_at_all": _bools("tttttttt", "tttttttt"),
    "overflow": _bools("IItIIttI", "tttIIItI"),  # more media tokens than media
    "surplus": _bools("ttIttttt", "IttttItt"),  # more media than media tokens
}


def _block(dtype: torch.dtype = torch.float64, **options) -> GatedCrossAttentionBlock:
    torch.manual_seed(3)
    block = GatedCrossAttentionBlock(16, 12, heads=2, head_dim=8, ff_mult=2, **options).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, 8, 16, dtype=dtype), torch.randn(2, IMAGES, LATENTS, 12, dtype=dtype)


def _media_time(where: Tensor, rows: int, cached: bool, attend_previous: bool) -> Tensor:
    """Which medium each row is about, counting from 1; 0 is none."""
    total = where.sum(1, keepdim=True)
    if cached:
        time = total.expand(-1, rows)
    else:
        time = where.cumsum(1)
        if not attend_previous:
            time = time + (~where).long()
            time = time.where(time <= total, 0)
    return time


def _oracle(block, x, media, where, *, cached=False) -> Tensor:
    """The published block, dense: masked scores are -finfo.max, so rows without any key average everything."""
    last, latents = block.media_mode == "last", media.shape[2]
    x_norm = torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias)
    flat = media.flatten(1, 2)
    q, k, v = (
        (t.unflatten(-1, (-1, 8)).transpose(1, 2)) for t in (block.q(x_norm), *block.kv(flat).chunk(2, -1))
    )
    time = _media_time(where, x.shape[1], cached, block.attend_previous)
    medium = torch.arange(flat.shape[1]) // latents + 1
    seen = time.unsqueeze(-1) == medium if last else time.unsqueeze(-1) >= medium
    scores = (q * 8**-0.5) @ k.transpose(2, 3)
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.finfo(scores.dtype).max)
    p = scores.softmax(-1)
    if last:
        p = p.masked_fill((time == 0)[:, None, :, None], 0)
    if block.no_media == "zero":
        p = p.masked_fill(~seen.any(-1)[:, None, :, None], 0)
    o = (p @ v).transpose(1, 2).flatten(2)
    y = x + block.attention_gate.tanh() * block.out(o)
    h = torch.nn.functional.layer_norm(y, y.shape[-1:], block.ffn_norm.weight, block.ffn_norm.bias)
    return y + block.ffn_gate.tanh() * block.down(torch.nn.functional.gelu(block.up(h)))


def _gradients(run, block, x, media) -> dict[str, Tensor]:
    x, media = x.clone().requires_grad_(), media.clone().requires_grad_()
    block.zero_grad()
    y = run(x, media)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad, "media": media.grad} | {
        n: p.grad for n, p in block.named_parameters()
    }


@pytest.mark.parametrize("cached", [False, True], ids=["own_media", "cached_media"])
@pytest.mark.parametrize("options", [
    {"media_mode": "last"}, {"media_mode": "all_previous"}, {"no_media": "zero"},
    {"media_mode": "all_previous", "no_media": "zero"}, {"attend_previous": False},
], ids=lambda o: "-".join(map(str, o.values())))  # fmt: skip
@pytest.mark.parametrize("text", TEXTS)
def test_follows_the_published_rules(text, options, cached):
    block, (x, media), where = _block(**options), _inputs(), TEXTS[text]
    ours = _gradients(lambda a, b: block(a, b, where, use_cached_media=cached), block, x, media)
    plain = _gradients(lambda a, b: _oracle(block, a, b, where, cached=cached), block, x, media)
    for name, value in plain.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_cached_rows_need_no_locations_of_their_own_length():
    block, (x, media) = _block(), _inputs()
    where = _bools("ItttItttttttt", "ttttttItttttt")
    y = block(x[:, :3], media, where, use_cached_media=True)
    torch.testing.assert_close(y, _oracle(block, x[:, :3], media, where, cached=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_text_before_any_image_is_untouched_bit_for_bit(dtype):
    block, (x, media) = _block(dtype), _inputs(dtype)
    with torch.no_grad():
        block.ffn_gate.zero_()
    y = block(x, media, TEXTS["usual"])
    assert torch.equal(y[0, :1], x[0, :1]) and not torch.equal(y[0, 1], x[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images_that_no_row_sees_get_exactly_no_gradient(dtype):
    block, (x, media) = _block(dtype), _inputs(dtype)
    grads = _gradients(lambda a, b: block(a, b, TEXTS["surplus"]), block, x, media)
    assert torch.equal(grads["media"][0, 1:], torch.zeros_like(media[0, 1:]))
    assert torch.equal(grads["media"][1, 2:], torch.zeros_like(media[1, 2:]))
    assert bool((grads["media"][0, 0] != 0).any())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_what_lies_in_unseen_images_changes_no_bit(poison):
    block, (x, media) = _block(torch.float32), _inputs(torch.float32)
    where, bad = TEXTS["surplus"], media.clone()
    bad[0, 1:] = bad[1, 2:] = 0
    clean = _gradients(lambda a, b: block(a, b, where), block, x, bad)
    k, v = block.project_media(bad)
    spoilt = [t.clone() for t in (k, v)]
    for t in spoilt:  # the projections of images 1, 2 of the first sample and of image 2 of the second
        t.view(2, IMAGES, -1)[0, 1:] = t.view(2, IMAGES, -1)[1, 2:] = poison
    x_ = x.clone().requires_grad_()
    y = block(x_, bad, where, media_kv=tuple(spoilt))
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert torch.equal(y.detach(), clean["y"]) and torch.equal(x_.grad, clean["x"])


def test_an_image_reaches_its_own_text_only():
    """Changing an image leaves alone what stands before it and, in "last" mode, what stands after the next one."""
    block, (x, media), where = _block(torch.float32), _inputs(torch.float32), _bools("ttIttItt", "ttIttItt")
    y = block(x, media, where)
    for changed, same in ((1, slice(0, 5)), (0, slice(5, 8)), (2, slice(0, 8))):
        other = media.clone()
        other[:, changed] += 1
        z = block(x, other, where)
        assert torch.equal(z[:, same], y[:, same]), changed
        assert changed == 2 or not torch.equal(z, y)


def test_without_locations_every_row_sees_everything():
    block, (x, media) = _block(media_mode="all_previous"), _inputs()
    where = torch.zeros(2, 8, dtype=torch.bool)
    where[:, :3] = True  # from the third row on, all three images are previous ones
    torch.testing.assert_close(block(x, media)[:, 2:], _oracle(block, x, media, where)[:, 2:])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_product_for_all_blocks_is_the_same_as_one_for_each(qk_norm):
    blocks = [_block(qk_norm=qk_norm) for _ in range(3)]
    for n, block in enumerate(blocks):
        torch.nn.init.normal_(block.kv.weight, std=0.1 * (n + 1))
    media = _inputs()[1]
    for block, (k, v) in zip(blocks, project_media_all(blocks, media), strict=True):
        for ours, alone in zip((k, v), block.project_media(media), strict=True):
            torch.testing.assert_close(ours, alone)
    k, v = _block().kv(media).flatten(0, 2).chunk(2, -1)
    torch.testing.assert_close(
        _block().project_media(media), (k.unflatten(-1, (2, 8)), v.unflatten(-1, (2, 8)))
    )


@pytest.mark.parametrize("options", [
    {"norm": "rms"}, {"ffn": "relu"}, {"ffn": "squared_relu"}, {"ffn": "swiglu"}, {"gate": "vector"}, {"qk_norm": True},
], ids=str)  # fmt: skip
def test_every_option_has_the_gradient_of_its_function(options):
    block, (x, media) = _block(**options), _inputs()
    where = TEXTS["usual"]
    parameters = list(block.parameters())
    inputs = tuple(t.detach().clone().requires_grad_() for t in (x, media, *parameters))

    def run(x, media, *values):
        named = dict(zip((n for n, _ in block.named_parameters()), values, strict=True))
        return torch.func.functional_call(block, named, (x, media, where))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_a_new_block_is_the_identity_and_its_gates_learn():
    block = GatedCrossAttentionBlock(16, 12, heads=2, head_dim=8)
    x, media = _inputs(torch.float32)
    y = block(x, media, TEXTS["usual"])
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert block.attention_gate.grad.abs() > 0 and block.ffn_gate.grad.abs() > 0
    assert torch.equal(block.q.weight.grad, torch.zeros_like(block.q.weight))


def test_under_autocast_a_narrow_residual_stream_meets_wide_blocks():
    block, (x, media), where = _block(torch.float32), _inputs(torch.float32), TEXTS["usual"]
    with pytest.raises(TypeError, match="x: got torch"):
        block(x.bfloat16(), media, where)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, wide = block(x.bfloat16(), media, where), block(x, media, where)
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    torch.testing.assert_close(wide, block(x, media, where), rtol=0.05, atol=0.1)
    torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.1)


def test_bad_input_is_refused_by_name():
    block, (x, media), where = _block(), _inputs(), TEXTS["usual"]
    for error, match, call in (
        (ValueError, "x: got shape", lambda: block(x[0], media, where)),
        (ValueError, "media: got shape", lambda: block(x, media[0], where)),
        (ValueError, "media: got shape", lambda: block(x, media[..., :5], where)),
        (ValueError, "media: got shape", lambda: block(x, media[:1], where)),
        (ValueError, "media_locations: got shape", lambda: block(x, media, where[:, :5])),
        (TypeError, "media_locations: got torch.int64", lambda: block(x, media, where.long())),
        (ValueError, "media_mode", lambda: _block(media_mode="first")),
        (ValueError, "no_media", lambda: _block(no_media="nothing")),
        (ValueError, "gate", lambda: _block(gate="open")),
        (ValueError, "ffn", lambda: _block(ffn="tanh")),
        (ValueError, "norm", lambda: _block(norm="batch")),
        (ValueError, "expected the same for all", lambda: project_media_all(
            [block, GatedCrossAttentionBlock(16, 12, heads=4, head_dim=8).double()], media)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
