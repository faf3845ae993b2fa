"""Few queries over nothing, over padding, and over what padding holds: exact zeros, finite gradients, or one sentence."""

from __future__ import annotations

import math

import pytest
import torch
from published_qformer import CONFIG, lavis_state

from mmkernels import latent_attention, weights
from mmkernels.layers import PerceiverResampler, QFormer


def qformer(**changes) -> QFormer:
    module = QFormer(type(CONFIG)(**{**vars(CONFIG), "dropout": 0.0, **changes})).double()
    weights.load(module, lavis_state(), source="lavis")
    return module


def layer(images: int, tokens: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64).requires_grad_()

    return {
        "latents": draw(images, 3, 6), "media": draw(images, tokens, 5), "w_q": draw(8, 6), "w_kv": draw(16, 5),
        "w_o": draw(7, 8), "b_o": draw(7),
    }  # fmt: skip


def test_the_op_over_no_tokens_gives_the_bias():
    x = layer(2, 0)
    out = latent_attention(**x, heads=2)
    assert torch.equal(out, x["b_o"].expand(2, 3, 7))  # type: ignore[arg-type]
    out.sum().backward()  # type: ignore[union-attr]
    assert not any(t.grad.any() for n, t in x.items() if n != "b_o") and (x["b_o"].grad == 6).all()


def test_the_op_over_no_images_gives_nothing():
    x = layer(0, 4)
    out = latent_attention(**x, heads=2)
    out.sum().backward()  # type: ignore[union-attr]
    assert out.shape == (0, 3, 7) and not any(t.grad.any() for t in x.values())  # type: ignore[union-attr]
    packed = {**layer(0, 4), "media": torch.zeros(0, 5, dtype=torch.float64)}
    edges = torch.zeros(1, dtype=torch.int32)
    assert latent_attention(**packed, heads=2, cu_seqlens=edges).shape == (0, 3, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("edges", "why"),
    [
        ([0, 3, 2, 4], "expected to rise from 0 to media's 4 tokens"),
        ([0, 2, 3, 9], "expected to rise from 0 to media's 4 tokens"),
        ([-1, 0, 2, 4], "expected to rise from 0 to media's 4 tokens"),
        ([0, 4], "got 2 edges, expected 4 edges around 3 images"),
        ([], "got 0 edges, expected 4 edges around 3 images"),
    ],
)
def test_edges_that_do_not_fit_are_refused(edges, why):
    x = layer(3, 4)
    x["media"] = x["media"][0]
    with pytest.raises(ValueError, match=f"cu_seqlens: .*{why}"):
        latent_attention(**x, heads=2, cu_seqlens=torch.tensor(edges, dtype=torch.int32))


def test_a_perceiver_over_no_tokens_reads_its_latents_alone():
    torch.manual_seed(0)
    resampler = PerceiverResampler(16, depth=2, heads=2, head_dim=8, latents=3).double()
    outs = []
    for shape in ((2, 1, 1, 0, 16), (2, 1, 0, 5, 16)):
        out = resampler(torch.zeros(shape, dtype=torch.float64))
        out.sum().backward()
        assert out.shape == (2, 1, 3, 16) and out.isfinite().all()
        outs.append(out)
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0][0], outs[0][1])
    assert all(p.grad.isfinite().all() for p in resampler.parameters())


@pytest.mark.parametrize("mode", ["itc", "itg", "itm", "instruct"])
@pytest.mark.parametrize("fill", [7, -5, 10**9])
def test_text_that_is_padding_altogether_says_nothing(mode, fill):
    """Queries are as without text; ids out of range are never looked up."""
    module = qformer()
    image = torch.randn(2, 5, CONFIG.image_width, dtype=torch.float64)
    ids, mask = torch.full((2, 4), 3), torch.tensor([[True] * 4, [False] * 4])
    alone = module(image)
    wanted = module(image, text_ids=ids, text_mask=mask, mode=mode)
    torch.testing.assert_close(wanted[1, :3], alone[1], rtol=1e-12, atol=1e-12)
    assert wanted.isfinite().all()
    ids[1] = fill
    module.zero_grad()
    found = module(image, text_ids=ids, text_mask=mask, mode=mode)
    assert torch.equal(found[:, :3], wanted[:, :3]) and torch.equal(found[0], wanted[0])
    found[:, :3].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_an_image_of_no_tokens_is_not_seen():
    """As one whose tokens are all hidden, whatever these hold."""
    module = qformer()
    empty = module(torch.zeros(2, 0, CONFIG.image_width, dtype=torch.float64))
    hidden = torch.full((2, 4, CONFIG.image_width), math.nan, dtype=torch.float64)
    masked = module(hidden, image_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(empty, masked) and empty.isfinite().all()
    masked.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
