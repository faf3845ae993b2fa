"""The resampler's options and edges; its arithmetic is tested against the authors' in tests/parity."""

from __future__ import annotations

import pytest
import torch

from mmkernels.layers import PerceiverResampler


def _resampler(**options) -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(16, **{"depth": 2, "heads": 2, "head_dim": 8, "latents": 3, **options})


def test_frames_are_one_run_of_tokens_marked_by_their_place():
    resampler = _resampler(max_frames=4, max_media=3)
    media = torch.randn(2, 3, 4, 5, 16)
    y = resampler(media)
    assert y.shape == (2, 3, 3, 16)
    plain = _resampler()
    plain.load_state_dict(
        {k: v for k, v in resampler.state_dict().items() if k not in ("frame_embeddings", "media_embeddings")}
    )
    marked = media + resampler.frame_embeddings[:, None] + resampler.media_embeddings[:, None, None]
    torch.testing.assert_close(plain(marked.flatten(2, 3).unsqueeze(2)), y)
    assert not torch.allclose(resampler(media.flip(2)), y)


def test_every_medium_is_read_alone():
    resampler, media = _resampler(), torch.randn(2, 3, 1, 5, 16)
    alone = torch.stack([resampler(media[b : b + 1, i : i + 1])[0, 0] for b in range(2) for i in range(3)])
    torch.testing.assert_close(resampler(media).flatten(0, 1), alone)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_statistics_taken_once_change_nothing(qk_norm, monkeypatch):
    """Many media are normalised once, few in every layer: the same outputs and gradients."""
    resampler, media, found = _resampler(qk_norm=qk_norm).double(), torch.randn(2, 2, 1, 12, 16).double(), []
    for name, parameter in resampler.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    assert resampler._many(media.flatten(0, 1).flatten(1, 2)) and not resampler._many(media[:1, 0, 0])
    for many in (True, False):
        monkeypatch.setattr(resampler, "_many", lambda media, many=many: many)
        leaf = media.clone().requires_grad_()
        y = resampler(leaf)
        found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *resampler.parameters()))))
    torch.testing.assert_close(*found)


def test_no_media_give_no_latents():
    media = torch.randn(2, 0, 1, 5, 16, requires_grad=True)
    y = _resampler(max_media=2)(media)
    assert y.shape == (2, 0, 3, 16)
    y.sum().backward()


def test_fractional_feed_forward():
    assert _resampler(ff_mult=1.5).layers[0].mlp.up.weight.shape == (24, 16)


def test_bad_input_is_refused_by_name():
    resampler = _resampler(max_frames=2, max_media=2)
    for match, media in (
        ("media: got shape", torch.randn(2, 3, 5, 16)),
        ("media: got shape", torch.randn(1, 1, 1, 5, 8)),
        ("got 3, expected at most max_frames = 2", torch.randn(1, 1, 3, 5, 16)),
        ("got 3, expected at most max_media = 2", torch.randn(1, 3, 1, 5, 16)),
    ):
        with pytest.raises(ValueError, match=match):
            resampler(media)
    with pytest.raises(ValueError, match="ffn"):
        _resampler(ffn="swiglu")
    with pytest.raises(ValueError, match="latents: got 0"):
        _resampler(latents=0)
