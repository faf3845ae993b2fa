"""A vision tower over packed slices: every slice as if alone, one compilation for every mix, published presets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmkernels.layers import VisionConfig, VisionTower
from mmkernels.layers import vision as presets
from mmkernels.layers.modality_adapter import AdapterConfig

TINY = VisionConfig(28, 7, 32, 2, 2, 64)  # 4 x 4 patches
FORMS = {
    "clip": TINY,
    "cls-patch": replace(TINY, keep_class=True),
    "penultimate": replace(TINY, select_layer=-2),
    "embedding": replace(TINY, select_layer=0),
    "siglip": replace(
        TINY, class_token=False, pre_norm=False, patch_bias=True, post_norm=True, activation="gelu_tanh"
    ),
    "eva": replace(TINY, pre_norm=False, patch_bias=True, keep_class=True, norm_after=True),
}
MIXES = (
    [[4, 4], [2, 7], [1, 1]],
    [[3, 3], [0, 0]],  # a lone slice is a size of 1, which compilers treat apart
    [[5, 2], [4, 4], [1, 9], [2, 2]],
    [[6, 6], [1, 3]],
)


def _patches(*mix: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    hw = torch.tensor(mix)
    return torch.randn(int(hw.prod(1).sum()), 147), hw


@pytest.mark.parametrize("form", FORMS)
def test_slices_of_the_towers_size_are_its_images(form: str) -> None:
    tower = VisionTower(FORMS[form]).double()
    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    patches = presets._patchify(images, 7).flatten(0, 1)
    packed = tower(patches, torch.full((3, 2), 4))
    torch.testing.assert_close(packed, tower(images).flatten(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_slice_is_encoded_as_if_alone(form: str) -> None:
    tower = VisionTower(FORMS[form]).double()
    patches, hw = _patches(*MIXES[2])
    whole = tower(patches.double(), hw)
    areas = hw.prod(1).tolist()
    parts = [tower(p.double(), one[None]) for p, one in zip(patches.split(areas), hw, strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-12)


def test_any_size_of_image_is_a_slice_of_that_size() -> None:
    tower = VisionTower(replace(TINY, any_size=True)).double()
    images = torch.randn(2, 3, 21, 35, dtype=torch.float64)
    patches = presets._patchify(images, 7).flatten(0, 1)
    packed = tower(patches, torch.tensor([[3, 5], [3, 5]]))
    torch.testing.assert_close(
        packed, tower(images).flatten(0, 1), rtol=0, atol=1e-6
    )  # images' table is float32


def test_images_leave_out_what_is_no_whole_patch() -> None:
    tower = VisionTower(replace(TINY, image_size=30))
    images = torch.randn(1, 3, 30, 30)
    changed = images.clone()
    changed[..., 28:] = torch.nan
    assert torch.equal(tower(images), tower(changed))


def test_a_dropped_path_is_a_slices_own() -> None:
    torch.manual_seed(0)
    tower = VisionTower(replace(TINY, layers=1, keep_class=True)).double().train()
    tower.blocks[0].config = replace(tower.blocks[0].config, drop_path=0.5)
    patches, hw = _patches(*[[2, 2]] * 40)
    patches = patches[:4].repeat(40, 1).double()
    out = tower(patches, hw).view(40, -1)
    kinds = torch.unique(out.detach().round(decimals=9), dim=0)
    assert len(kinds) == 4  # either sum may fall out, of all of a slice's rows
    tower.eval()
    still = tower(patches, hw).view(40, -1)
    torch.testing.assert_close(still, still[:1].expand(40, -1))


def test_drop_path_rises_to_the_last_block() -> None:
    tower = VisionTower(replace(TINY, layers=5, drop_path=0.4))
    rates = [block.config.drop_path for block in tower.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_one_compiled_tower_serves_every_mix_of_slices() -> None:
    torch._dynamo.reset()
    tower, counter = VisionTower(TINY), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tower, backend=counter, fullgraph=True)
    for mix in MIXES:
        patches, hw = _patches(*mix)
        tower.zero_grad()
        compiled(patches, hw).square().sum().backward()
        found = [p.grad.clone() for p in tower.parameters() if p.grad is not None]
        tower.zero_grad()
        want = tower(patches, hw)
        want.square().sum().backward()
        torch.testing.assert_close(compiled(patches, hw), want, rtol=1e-5, atol=1e-5)
        grads = [p.grad for p in tower.parameters() if p.grad is not None]
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_a_batch_without_slices_is_empty() -> None:
    tower = VisionTower(TINY)
    out = tower(torch.zeros(0, 147), torch.zeros(0, 2, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 32) and tower.patch.weight.grad is not None


@pytest.mark.parametrize(
    ("hw", "config", "text"),
    [
        ([[4, 3]], TINY, "patches: got 16 rows, expected the 12 patches"),
        ([[4, 4, 1]], TINY, "slice_hw: got shape"),
        ([[4, 4]], replace(TINY, adapter=AdapterConfig()), "slice_hw: got packed slices, expected images"),
        ([[4, 4]], replace(TINY, patch_size=14), "patches: got shape"),
    ],
)
def test_bad_input_is_one_clear_error(hw: list[list[int]], config: VisionConfig, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VisionTower(config)(torch.zeros(16, 147), torch.tensor(hw))


PARAMETERS = {
    "CLIP_L": 303_177_728, "CLIP_L_336": 303_505_408, "OPEN_CLIP_BIGG": 1_842_774_016, "EVA_G": 985_949_440,
    "SIGLIP_B": 85_797_120, "SIGLIP_L": 303_361_024, "SIGLIP_SO400M": 412_442_352, "SIGLIP_SO400M_384": 412_987_248,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_size(name: str) -> None:
    with torch.device("meta"):
        tower = VisionTower(getattr(presets, name))
    assert sum(p.numel() for p in tower.parameters()) == PARAMETERS[name]
