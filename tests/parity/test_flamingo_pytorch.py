"""Against `flamingo-pytorch`: resampler and gated block, both media modes, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from mmkernels.layers import GatedCrossAttentionBlock, PerceiverResampler

flamingo = pytest.importorskip("flamingo_pytorch")
DTYPES = (torch.float64, torch.float32)
LOCATIONS = torch.tensor(
    [
        [0, 0, 1, 0, 0, 1, 0, 1, 0],  # text before the first image, three images
        [
            1,
            1,
            0,
            1,
            0,
            1,
            0,
            1,
            0,
        ],  # two images in a row; five media tokens for three media: uniform past the last
        [0, 0, 0, 0, 0, 0, 0, 0, 0],  # no image at all
        [0, 1, 0, 0, 0, 0, 0, 0, 0],  # surplus media
    ],
    dtype=torch.bool,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("located", [True, False], ids=["located", "everywhere"])
@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_gated_block(agree, mode, located, dtype):
    torch.manual_seed(0)
    theirs = flamingo.GatedCrossAttentionBlock(
        dim=24, dim_head=8, heads=3, only_attend_immediate_media=mode == "last"
    ).to(dtype)
    ours = GatedCrossAttentionBlock(24, 24, heads=3, head_dim=8, media_mode=mode).to(dtype)
    x, media = torch.randn(4, 9, 24, dtype=dtype), torch.randn(4, 3, 5, 24, dtype=dtype)
    where = LOCATIONS if located else None
    agree(
        ours,
        theirs,
        "open_flamingo",
        lambda a, b: ours(a, b, where),
        lambda a, b: theirs(a, b, where),
        (x, media),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resampler(agree, dtype):
    torch.manual_seed(1)
    theirs = flamingo.PerceiverResampler(
        dim=24, depth=2, dim_head=8, heads=3, num_latents=6, num_media_embeds=4, ff_mult=2
    ).to(dtype)
    ours = PerceiverResampler(24, depth=2, heads=3, head_dim=8, latents=6, ff_mult=2, max_media=4).to(dtype)
    media = torch.randn(2, 3, 10, 24, dtype=dtype)
    agree(
        ours, theirs, "open_flamingo", lambda m: ours(m.unsqueeze(2)), theirs, (media,),
        rename=lambda key: "media_time_embs" if key == "media_pos_emb" else key,
    )  # fmt: skip
