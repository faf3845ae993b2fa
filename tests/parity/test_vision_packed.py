"""Packed slices through our tower and, one picture at a time, through Hugging Face's CLIP and SigLIP."""

from __future__ import annotations

import pytest
import torch
import transformers

from mmkernels.layers import VisionConfig, VisionTower
from mmkernels.layers.vision import _patchify

SIZES = ((28, 28), (14, 42), (35, 21))
COMMON = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip


def _packed(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    hw = torch.tensor([[x.shape[2] // 7, x.shape[3] // 7] for x in images])
    return torch.cat([_patchify(x, 7).flatten(0, 1) for x in images]), hw


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("select", "keep"), [(-1, False), (-2, False), (-2, True), (0, False)])
def test_clip(agree, select: int, keep: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**COMMON)).to(dtype).eval()
    ours = VisionTower(VisionConfig(28, 7, 32, 3, 2, 64, select_layer=select, keep_class=keep)).to(dtype)
    images = [torch.randn(1, 3, *size, dtype=dtype) for size in SIZES]

    def published(*images: torch.Tensor) -> torch.Tensor:
        rows = [
            theirs(x, interpolate_pos_encoding=True, output_hidden_states=True)
            .hidden_states[select]
            .squeeze(0)
            for x in images
        ]
        return torch.cat([x if keep else x[1:] for x in rows])

    # the published table is stretched in float32 at most
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-5}[dtype]
    agree(
        ours,
        theirs,
        "huggingface_clip",
        lambda *x: ours(*_packed(list(x))),
        published,
        images,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_siglip(agree, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**COMMON, vision_use_head=False)
    theirs = transformers.SiglipVisionModel(config).to(dtype).eval()
    tower = VisionConfig(
        28, 7, 32, 3, 2, 64, "gelu_tanh", 1e-6, class_token=False, pre_norm=False, patch_bias=True, post_norm=True
    )  # fmt: skip
    ours = VisionTower(tower).to(dtype)
    images = [torch.randn(1, 3, *size, dtype=dtype) for size in SIZES]

    def published(*images: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [theirs(x, interpolate_pos_encoding=True).last_hidden_state.squeeze(0) for x in images]
        )

    agree(ours, theirs, "huggingface_clip", lambda *x: ours(*_packed(list(x))), published, images)
