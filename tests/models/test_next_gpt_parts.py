"""NExT-GPT's encoders and makers by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmkernels import models
from mmkernels.models.next_gpt import MODALITIES
from mmkernels.models.next_gpt_parts import Maker, spectrogram

TINY: Any = models.config("next_gpt-tiny")


def test_an_encoder_gives_one_vector_and_means_its_clips():
    model: Any = models.build("next_gpt-tiny").eval()
    videos, audios = torch.randn(2, 1, 3, 3, 32, 32), torch.randn(2, 1, 1024)
    apart = model.vision(videos[:, 0].flatten(0, 1).unsqueeze(1))
    torch.testing.assert_close(apart.norm(dim=-1), torch.ones(6))
    torch.testing.assert_close(model.read("video", videos)[:, 0], apart.unflatten(0, (2, 3)).mean(1))
    assert model.read("audio", audios).shape == (2, 1, 64)
    tone = torch.sin(torch.arange(1024) * (2 * torch.pi * 10 / 64))[None]  # 10 periods of 64 samples: row 9
    assert spectrogram(tone, 32)[0, 0].mean(1).argmax() == 9
    with pytest.raises(ValueError, match="wave: got 10 samples, expected 64"):
        spectrogram(torch.zeros(1, 10), 32)


@pytest.mark.parametrize("which", range(3), ids=MODALITIES)
def test_makers_cut_and_join_and_learn(which):
    torch.manual_seed(0)
    signal = TINY.signals[which]
    maker = Maker(signal.maker, 512, signal.queries, signal.width)
    x = torch.rand(4, *signal.maker.shape)
    assert torch.equal(maker._join(maker._cut(x)), x)
    ids, noise, time = torch.arange(12).view(4, 3), torch.randn_like(x), torch.rand(4)
    optimizer, losses = torch.optim.AdamW(maker.parameters(), 2e-3), []
    for _ in range(12):
        loss = maker.loss(maker.conditions(ids), x, noise, time)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert maker.make(maker.conditions(ids), steps=2).shape == x.shape
    with pytest.raises(ValueError, match="ids: got texts of 17 tokens"):
        maker.conditions(torch.zeros(1, 17, dtype=torch.long))
