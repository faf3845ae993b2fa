"""Released LLaMA-VID files: every key by its authors' name, strictly, with the tower in them or without."""

from __future__ import annotations

import pytest
import torch
from published_files import bert, both, eva, llama
from torch import Tensor

from mmkernels import models, weights
from mmkernels.layers import VisionTower

TOWER = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def pair() -> tuple[models.LlamaVid, models.LlamaVid]:
    torch.manual_seed(0)
    made = models.build("llama-vid-tiny"), models.build("llama-vid-tiny")
    with torch.no_grad():
        for model in made:
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.1)
                if name.startswith("vision.") and name.endswith("qkv.bias"):
                    parameter.unflatten(0, (3, -1))[1] = 0  # keys have none
    return made  # type: ignore[return-value]


def _released(model: models.LlamaVid, tower: bool) -> dict[str, Tensor]:
    """The model's parameters under the names of the released files, made by hand."""
    state, out = model.state_dict(), {}
    lines = {
        "norm": "vlm_att_ln", "query": "vlm_att_projector", "key": "vlm_att_key_projector",
        "value": "vlm_att_val_projector", "content_up": "mm_projector.0", "content_down": "mm_projector.2",
    }  # fmt: skip
    for ours, theirs in lines.items():
        out.update(both(state, f"connector.{ours}", f"model.{theirs}"))
    out["model.vlm_att_query"] = state["connector.qformer.query_tokens"].unsqueeze(0)
    out |= bert(state, "connector.qformer.", "model.vlm_att_encoder.bert.", model.config.connector.qformer)
    return out | llama(state) | (eva(state, TOWER, 8) if tower else {})


@pytest.mark.parametrize("tower", [True, False])
def test_a_released_model_loads(pair: tuple[models.LlamaVid, models.LlamaVid], tower: bool) -> None:
    source, target = pair
    before = {n: p.clone() for n, p in target.state_dict().items()}
    weights.load(target, _released(source, tower), source="llama_vid")
    for name, value in target.state_dict().items():
        kept = name.startswith("vision.") and not tower
        assert torch.equal(value, before[name] if kept else source.state_dict()[name]), name


def test_what_does_not_belong_is_refused(pair: tuple[models.LlamaVid, models.LlamaVid]) -> None:
    source, target = pair
    state = _released(source, False)
    del state["model.layers.3.mlp.up_proj.weight"], state["model.vlm_att_query"]
    state |= {
        "model.layers.4.input_layernorm.weight": torch.ones(128),
        "model.vlm_att_bert_proj.bias": torch.ones(2),
    }
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        weights.load(target, state, source="llama_vid")
    for key in ("model.layers.3.mlp.up_proj.weight", "model.vlm_att_query", "model.layers.4.input_layernorm.weight",
                "model.vlm_att_bert_proj.bias"):  # fmt: skip
        assert key in str(error.value)


def test_the_connector_loads_alone(pair: tuple[models.LlamaVid, models.LlamaVid]) -> None:
    """From the whole file, and from the adapter file of the first stage, which has it alone."""
    source, target = pair
    whole = _released(source, True)
    adapter = {k: v for k, v in whole.items() if k.startswith(("model.vlm_att_", "model.mm_projector."))}
    for state in (whole, adapter):
        with torch.no_grad():
            target.connector.value.weight.zero_()
        weights.load(target.connector, state, source="llama_vid")
        for name, value in target.connector.state_dict().items():
            assert torch.equal(value, source.connector.state_dict()[name]), name


def test_the_tower_loads_alone_and_keeps_its_class_token(
    pair: tuple[models.LlamaVid, models.LlamaVid],
) -> None:
    """The file of the tower has one block more than is read, and a head."""
    source, _ = pair
    state = {k.removeprefix(TOWER): v for k, v in eva(source.state_dict(), TOWER, 8).items()}
    state |= {
        "blocks.39.attn.q_bias": torch.ones(3),
        "norm.weight": torch.ones(3),
        "head.bias": torch.ones(3),
    }
    tower = VisionTower(source.config.vision).eval()
    weights.load(tower, state, source="eva")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = tower(images)
        assert tokens.shape == (2, 17, 96)
        torch.testing.assert_close(tokens, _eva_by_hand(state, images), rtol=1e-4, atol=1e-4)


def _eva_by_hand(p: dict[str, Tensor], images: Tensor) -> Tensor:
    """The published tower: a convolution, then pre-norm blocks of four heads, no norm around them."""
    f = torch.nn.functional
    x = f.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([p["cls_token"].expand(2, -1, -1), x], 1) + p["pos_embed"]
    for i in range(2):
        at = f"blocks.{i}."
        h = f.layer_norm(x, (96,), p[f"{at}norm1.weight"], p[f"{at}norm1.bias"], 1e-6)
        bias = torch.cat([p[f"{at}attn.q_bias"], torch.zeros(96), p[f"{at}attn.v_bias"]])
        q, k, v = f.linear(h, p[f"{at}attn.qkv.weight"], bias).view(2, 17, 3, 4, 24).permute(2, 0, 3, 1, 4)
        o = ((q * 24**-0.5) @ k.mT).softmax(-1) @ v
        x = x + f.linear(o.transpose(1, 2).flatten(2), p[f"{at}attn.proj.weight"], p[f"{at}attn.proj.bias"])
        h = f.layer_norm(x, (96,), p[f"{at}norm2.weight"], p[f"{at}norm2.bias"], 1e-6)
        h = f.gelu(f.linear(h, p[f"{at}mlp.fc1.weight"], p[f"{at}mlp.fc1.bias"]))
        x = x + f.linear(h, p[f"{at}mlp.fc2.weight"], p[f"{at}mlp.fc2.bias"])
    return x
