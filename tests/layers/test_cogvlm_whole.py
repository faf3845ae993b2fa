"""A whole CogVLM against the published computation in plain PyTorch, with the names of its files: both releases, both codes."""

from __future__ import annotations

from dataclasses import replace

import published_cogvlm as text
import pytest
import torch
from published_cogvlm_vision import Vision
from test_expert_block import _training_state
from torch import Tensor, nn

from mmkernels import models
from mmkernels.models import weights

LAYERS = 2
_SAT_VISION = {
    "patch_embedding.proj": "vit_model.mixins.patch_embedding.proj",
    "patch_embedding.position_embedding": "vit_model.transformer.position_embeddings",
    "patch_embedding.cls_embedding": "vit_model.transformer.word_embeddings.weight",
    "transformer.layers": "vit_model.transformer.layers",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
}


class Inner(nn.Module):
    """`model` of the released files."""

    def __init__(self, v2: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(512, 128)
        self.layers = nn.ModuleList(
            text.Layer(128, 4, 2 if v2 else 4, 96, bias=v2, base=5e5 if v2 else 1e4, eps=1e-5)
            for _ in range(LAYERS)
        )
        self.norm = text.RMSNorm(128, 1e-5)
        self.vision = Vision(
            size=32, patch=8, width=32, heads=2, hidden=48, layers=2, out=128, inner=96, conv=v2
        )  # fmt: skip


class Whole(nn.Module):
    def __init__(self, v2: bool) -> None:
        super().__init__()
        self.model, self.lm_head = Inner(v2), nn.Linear(128, 512, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1)

    def forward(self, images: Tensor, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids).index_put([types == 1], self.model.vision(images).flatten(0, 1))
        where = torch.tensor(
            [text.positions(t, m) for t, m in zip(types.tolist(), mask.long().tolist(), strict=True)]
        )
        for layer in self.model.layers:
            x = layer(x, types, where, mask)
        return self.lm_head(self.model.norm(x))


def pair(v2: bool) -> tuple[Whole, models.CogVLM]:
    torch.manual_seed(5)
    theirs, tiny = Whole(v2).double(), models.config("cogvlm-tiny")
    vision = replace(tiny.vision, image_size=32, width=32, heads=2, hidden=48, layers=2)
    block = replace(tiny.lm.block, hidden=96, kv_heads=2 if v2 else None)
    lm = replace(tiny.lm, block=block, layers=LAYERS, rotary_base=5e5 if v2 else 1e4)
    config = replace(tiny, vision=vision, lm=lm, hidden=96, conv=v2, vision_bias=v2)
    return theirs, models.build(config).double().eval()


def published_state(theirs: Whole) -> dict[str, Tensor]:
    state = {k: v for k, v in theirs.state_dict().items() if "rotary_emb" not in k}
    return state | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(LAYERS)}


def training_state(theirs: Whole) -> dict[str, Tensor]:
    state = {
        "transformer.word_embeddings.weight": theirs.model.embed_tokens.weight,
        "transformer.final_layernorm.weight": theirs.model.norm.weight,
        "mixins.lm.lm_head.weight": theirs.lm_head.weight,
        "mixins.rotary.rotary_emb.inv_freq": torch.ones(16),
    }
    for i, layer in enumerate(theirs.model.layers):
        state |= _training_state(layer.state_dict(), i)
    for key, value in theirs.model.vision.state_dict().items():
        for before, after in _SAT_VISION.items():
            key = key.replace(before, after)
        state[f"mixins.eva.{key}"] = value
    return state


@pytest.mark.parametrize("source", ["cogvlm", "cogvlm2", "cogvlm_sat"])
@torch.no_grad()
def test_logits_are_the_published_ones(source):
    v2 = source == "cogvlm2"
    theirs, ours = pair(v2)
    state = training_state(theirs) if source == "cogvlm_sat" else published_state(theirs)
    weights.load(ours, state, source=source)
    places = ours.config.places
    ids = torch.tensor([[1, *[2] * places, 50, 51, 52], [0, 1, *[2] * places, 53, 54]])
    images, mask = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64), ids != 0
    types = (ids == 2).long()
    found, wanted = ours(images, ids, mask).logits, theirs(images.flatten(0, 1), ids, types, mask)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-9, atol=1e-9)


def test_files_that_lack_or_hold_more_are_refused():
    theirs, ours = pair(False)
    state = published_state(theirs)
    state["model.vision.transformer.layers.9.mlp.fc1.bias"] = torch.zeros(1)
    del state["model.vision.boi"]
    with pytest.raises(
        ValueError, match=r"missing: model.vision.boi.*left over: model.vision.transformer.layers.9"
    ):
        weights.load(ours, state, source="cogvlm")
