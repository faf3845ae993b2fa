"""LLaVA-UHD's and SliME's adapters against plain implementations with the authors' names: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from published_uhd import Gated, Resampler, Selector, keep

from mmkernels import weights
from mmkernels.layers import MixtureAdapter, SpatialResampler, TextGuidedRouter

BOTH = [torch.float64, torch.float32]
SOURCES = {"original": "llava_uhd", "eccv": "llava_uhd", "slime": "slime"}


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("release", [*SOURCES])
@pytest.mark.parametrize("size", [(3, 3), (5, 4), (7, 2), (2, 6), (6, 9)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_resampler(agree, size, release, dtype):
    """Grids below the queries' (regions narrower than a cell), above it, and no squares."""
    torch.manual_seed(0)
    media = 32 if release == "slime" else 20
    theirs = Resampler(3, 32, 4, media, release).to(dtype)
    if release == "slime":
        theirs.pos_embed.data = theirs.pos_embed.data.half()
    ours = SpatialResampler(3, 32, 4, media, release=release).to(dtype)
    hw = torch.tensor([size, size])
    x = torch.randn(2, size[0] * size[1], media, dtype=dtype)
    agree(ours, theirs, SOURCES[release], lambda t: ours(t, hw), lambda t: theirs(t, size), (x,))


def test_queries_of_twelve_by_twelve_regions_see_what_roi_align_gives_them():
    torch.manual_seed(1)
    theirs = Resampler(12, 8, 2, 8, "eccv").double()
    ours = SpatialResampler(12, 8, 2, 8, release="eccv").double()
    weights.load(ours, theirs.state_dict(), source="llava_uhd")
    for size in ((24, 24), (29, 19), (7, 36)):
        x = torch.randn(1, size[0] * size[1], 8, dtype=torch.float64)
        torch.testing.assert_close(ours(x, torch.tensor([size])), theirs(x, size), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("case", ["mixture", "noise", "0", "1", "local"])
def test_mixture(agree, case, dtype):
    torch.manual_seed(2)
    theirs, ours = Gated(32, 24, 3, 4).to(dtype).eval(), MixtureAdapter(32, 24, 3, 4).to(dtype).eval()
    theirs.attn.pos_embed.data = theirs.attn.pos_embed.data.half()
    x = torch.randn(2, 4 if case == "local" else 9, 32, dtype=dtype)
    noise = torch.randn(2, 9, 2, dtype=dtype) if case == "noise" else None
    expert = int(case) if case.isdigit() else None

    def run(t):
        # what a pass leaves out has no gradient of ours: a zero one
        return ours(t, expert, noise) + 0 * sum(p.sum() for p in ours.parameters())

    agree(ours, theirs, "slime", run, lambda t: theirs(t, noise, -1 if expert is None else expert), (x,))
    if case in ("mixture", "noise"):
        assert ours.gates.shape == (2, 9, 2)
        assert ((ours.gates.sum(-1) - 1).abs() < 1e-5).all()
    else:
        assert ours.gates is None
    torch.testing.assert_close(ours(x[0], expert), ours(x, expert)[0])


def test_cosine_router():
    torch.manual_seed(3)
    router = TextGuidedRouter("cosine", 16, 0.7, 0.5).double().eval()
    tokens, text = torch.randn(30, 16).double(), torch.randn(9, 16).double()
    mask = torch.rand(9) < 0.6
    for given in (mask, None):
        s = F.cosine_similarity(tokens[:, None], text[None], dim=-1)
        s = s.mean(1) if given is None else s.masked_fill(~given, 0).sum(1)
        kept = router(tokens, text, given)
        torch.testing.assert_close(router.scores, s)
        torch.testing.assert_close(router.probabilities, (s / 0.5).softmax(0))
        assert torch.equal(kept, keep((s / 0.5).softmax(0), 0.7))
    noise = torch.randn(30).double()
    want = F.cosine_similarity(tokens[:, None], text[None], dim=-1)[:, mask].sum(1) + 0.1 * noise
    assert torch.equal(router(tokens, text, mask, noise), keep((want / 0.5).softmax(0), 0.7))


@pytest.mark.parametrize("width", [16, 256])
def test_qformer_router(width):
    torch.manual_seed(4)
    theirs = Selector(width, max(1, width // 128)).double()
    router = TextGuidedRouter("qformer", width, 0.6, 0.25).double().eval()
    state = {f"model.sampler.selector.{k}": v for k, v in theirs.state_dict().items()}
    weights.load(router, {**state, "lm_head.weight": torch.ones(2, 2)}, source="slime")
    tokens, text = torch.randn(20, width).double(), torch.randn(7, width).double()
    mask = torch.tensor([True, False, True, True, False, True, True])
    s = theirs(tokens, text, mask, 0.25)
    kept = router(tokens, text, mask)
    torch.testing.assert_close(router.scores, s)
    assert torch.equal(kept, keep((s / 0.25).softmax(0), 0.6))
