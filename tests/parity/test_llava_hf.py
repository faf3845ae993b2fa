"""Against Hugging Face's LLaVA at a small size: logits, loss and every gradient, through the names of all its releases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import models, weights
from mmkernels.data import slicing
from mmkernels.layers import VisionConfig
from mmkernels.models.llava import LlavaConfig

transformers = pytest.importorskip("transformers")
# theirs takes softmax and angles in float32
TOLERANCE = {torch.float64: 3e-6, torch.float32: 1e-4}
IMAGE, PLACES = 59, 4
VISION = {
    "model_type": "clip_vision_model", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "rms_norm_eps": 1e-5,
}  # fmt: skip
TOKENS = models.Tokens(image=IMAGE, end_of_chunk=2, end_of_text=2, pad=0)


def config(**changes) -> LlavaConfig:
    lm = models.config("llava-1.5-7b").lm
    block = replace(lm.block, width=48, heads=4, kv_heads=2, hidden=64)
    vision = VisionConfig(28, 14, 32, 3, 4, 48, select_layer=-2)
    stage = replace(models.config("llava-1.5-7b").stages[0], trainable=("*",))
    return LlavaConfig(vision, replace(lm, block=block, layers=2, vocab=60), TOKENS, (stage,), **changes)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two pictures in the first row, one in the second, none in the third, which is padded."""
    ids = torch.randint(3, 50, (3, 14))
    ids[0, 1 : 1 + PLACES], ids[0, 8 : 8 + PLACES], ids[1, :PLACES] = IMAGE, IMAGE, IMAGE
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 9:] = False
    return ids, mask, torch.where(mask & (ids != IMAGE), ids, -100)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_loss_and_gradients(agree, dtype, strategy):
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, vision_feature_layer=-2,
            vision_feature_select_strategy=strategy,
        )
    ).to(dtype).eval()  # fmt: skip
    ours = config()
    ours = replace(ours, vision=replace(ours.vision, keep_class=strategy == "full"))
    ours = models.build(ours).to(dtype).eval()
    ids, mask, _ = batch()
    if strategy == "full":  # a place more for every picture's class token
        ids, mask = torch.cat([torch.full((3, 1), IMAGE), ids], 1), torch.cat([mask[:, :1], mask], 1)
        ids[2, 0], ids[0, 13] = 7, IMAGE
    labels = torch.where(mask & (ids != IMAGE), ids, -100)
    images = torch.randn(3, 3, 28, 28, dtype=dtype)

    def run_ours(x):
        output = ours(x, ids, mask, labels)
        return torch.cat([output.logits[mask].flatten(), output.loss.view(1).to(dtype)])

    def run_theirs(x):
        output = theirs(pixel_values=x, input_ids=ids, attention_mask=mask.long(), labels=labels)
        return torch.cat([output.logits[mask].flatten(), output.loss.view(1).to(dtype)])

    agree(ours, theirs, "huggingface", run_ours, run_theirs, (images,), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("release", ["5", "4.52", "4.36"])
def test_the_names_of_every_release(release):
    """5 has the tower without its wrapper, 4.52 with it, and before the language model was a whole one."""
    theirs = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE)
    )

    def named(key: str) -> str:
        if release != "5":
            key = key.replace("vision_tower.", "vision_tower.vision_model.")
        if release == "4.36":
            key = key.replace("model.language_model.", "language_model.model.").removeprefix("model.")
            key = key.replace("lm_head.", "language_model.lm_head.")
        return key

    ours = models.build(config())
    weights.load(ours, {named(k): v for k, v in theirs.state_dict().items()}, source="huggingface")
    assert torch.equal(ours.lm.head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.projector.input.weight, theirs.model.multi_modal_projector.linear_1.weight)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_llava_next(agree, dtype):
    """Pictures of three sizes in tiles; sizes and pinpoints are height first there."""
    torch.manual_seed(0)
    pinpoints = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    theirs = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, vision_feature_layer=-2,
            vision_feature_select_strategy="default", image_grid_pinpoints=[[h, w] for w, h in pinpoints],
        )
    ).to(dtype).eval()  # fmt: skip
    ours = config(aspect="anyres", pinpoints=pinpoints, rounding="hf")
    ours = models.build(ours).to(dtype).eval()
    sizes = [(40, 110), (100, 20), (56, 54)]
    plans = [slicing.llava_next(w, h, pinpoints, 28, rounding="hf") for w, h in sizes]
    most = max(plan.views for plan in plans)
    images = torch.randn(3, most, 3, 28, 28, dtype=dtype)
    short = torch.tensor([[5, IMAGE, 6, IMAGE, 7], [8, 9, IMAGE, 4, 3], [10, 11, 12, 0, 0]])
    ids, mask = ours.expand(short, short != 0, plans=plans)
    assert len({plan.grid for plan in plans}) == 3
    labels = torch.where(mask & (ids != IMAGE), ids, -100)

    def run_ours(x):
        output = ours(x, ids, mask, labels, plans=plans)
        return torch.cat([output.logits[mask].flatten(), output.loss.view(1).to(dtype)])

    def run_theirs(x):
        output = theirs(
            pixel_values=x, image_sizes=torch.tensor([(h, w) for w, h in sizes]), input_ids=ids,
            attention_mask=mask.long(), labels=labels,
        )  # fmt: skip
        return torch.cat([output.logits[mask].flatten(), output.loss.view(1).to(dtype)])

    agree(ours, theirs, "huggingface", run_ours, run_theirs, (images,), tolerance=TOLERANCE[dtype])
