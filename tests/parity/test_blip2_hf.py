"""Against Hugging Face's BLIP-2 and InstructBLIP at small sizes: logits, loss and every gradient, through published names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmkernels import models
from mmkernels.layers import BlockConfig, QFormerConfig, VisionConfig
from mmkernels.models.qformer import Blip2Config, Instruction

transformers = pytest.importorskip("transformers")
# theirs takes softmax, angles and additive masks in float32
TOLERANCE = {torch.float64: 3e-6, torch.float32: 1e-4}
IMAGE, QUERIES = 59, 4
VISION = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QFORMER = {
    "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 32,
    "encoder_hidden_size": 32, "vocab_size": 40, "max_position_embeddings": 16,
}  # fmt: skip
TOKENS = models.Tokens(image=IMAGE, end_of_chunk=2, end_of_text=2, pad=1)
STAGE = replace(models.config("blip2-opt-2.7b").stages[0], trainable=("*",))


def _config(lm, vocab: int) -> Blip2Config:
    vision = VisionConfig(
        28, 14, 32, 2, 4, 48, activation="gelu", eps=1e-6, pre_norm=False, patch_bias=True, keep_class=True
    )
    qformer = QFormerConfig(
        24,
        3,
        4,
        32,
        image_width=32,
        num_query=QUERIES,
        vocab=vocab,
        max_positions=16,
        dropout=0.0,
        text_head=False,
    )
    return Blip2Config(vision, qformer, lm, TOKENS, (STAGE,), norm_eps=1e-6, instruct=bool(vocab))


def _blip2():
    text = {
        "model_type": "opt", "hidden_size": 48, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4,
        "word_embed_proj_dim": 48, "vocab_size": 60, "max_position_embeddings": 64, "dropout": 0.0,
    }  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=text, image_token_index=IMAGE,
        num_query_tokens=QUERIES,
    )  # fmt: skip
    lm = models.config("blip2-opt-2.7b").lm
    lm = replace(
        lm, block=replace(lm.block, width=48, heads=4, hidden=64), layers=2, vocab=60, max_positions=64
    )
    return transformers.Blip2ForConditionalGeneration(config), _config(lm, 0)


def _instructblip():
    text = {
        "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64,
        "num_attention_heads": 4, "vocab_size": 60, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    config = transformers.InstructBlipConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=text, image_token_index=IMAGE,
        num_query_tokens=QUERIES,
    )  # fmt: skip
    lm = models.config("instructblip-vicuna-7b").lm
    block = BlockConfig(**{**vars(lm.block), "width": 48, "heads": 4, "hidden": 64})
    return transformers.InstructBlipForConditionalGeneration(config), _config(
        replace(lm, block=block, layers=2, vocab=60), 40
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("make", [_blip2, _instructblip])
def test_logits_loss_and_gradients(agree, make, dtype):
    torch.manual_seed(0)
    theirs, config = make()
    theirs = theirs.to(dtype).eval()
    ours = models.build(config).to(dtype).eval()
    images = torch.randn(3, 3, 28, 28, dtype=dtype)
    ids = torch.cat([torch.full((3, QUERIES), IMAGE), torch.randint(3, 50, (3, 7))], 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = False
    labels = torch.where(mask & (ids != IMAGE), ids, -100)
    told, more = None, {}
    if config.instruct:
        told = Instruction(torch.randint(1, 40, (3, 6)), torch.ones(3, 6, dtype=torch.bool))
        told.mask[0, 4:] = False
        more = {"qformer_input_ids": told.ids, "qformer_attention_mask": told.mask.long()}

    def run_ours(x):
        output = ours(x.unsqueeze(1), ids, mask, labels, instruction=told)
        return torch.cat([output.logits[mask].flatten(), output.loss.view(1).to(dtype)])

    def run_theirs(x):
        output = theirs(pixel_values=x, input_ids=ids, attention_mask=mask.long(), labels=labels, **more)
        return torch.cat([output.logits[mask].flatten(), output.loss.view(1).to(dtype)])

    agree(ours, theirs, "huggingface", run_ours, run_theirs, (images,), tolerance=TOLERANCE[dtype])
