"""More tiny models of Hugging Face: Q-Formers, resamplers, packed vision, experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import transformers
from hf_models import IMAGE, LLAMA, MODELS, Made, draw, ids_of, padding, randomised, with_image

_VISION = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QFORMER = {
    "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "cross_attention_frequency": 2, "encoder_hidden_size": 32, "vocab_size": 40, "max_position_embeddings": 16,
}  # fmt: skip
_OPT = {
    "model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "vocab_size": 64, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip


def blip2() -> Made:
    config = transformers.Blip2Config(
        vision_config=_VISION,
        qformer_config=_QFORMER,
        text_config=_OPT,
        image_token_index=IMAGE,
        num_query_tokens=4,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    return randomised(model), {**with_image(4, (5, 9), left=False), "pixel_values": draw(2, 3, 28, 28)}


def instructblip() -> Made:
    config = transformers.InstructBlipConfig(
        vision_config=_VISION,
        qformer_config=_QFORMER,
        text_config=LLAMA,
        image_token_index=IMAGE,
        num_query_tokens=4,
    )
    model = transformers.InstructBlipForConditionalGeneration(config)
    return randomised(model), {
        **with_image(4, (5, 9)), "pixel_values": draw(2, 3, 28, 28), "qformer_input_ids": ids_of(2, 6, 40),
        "qformer_attention_mask": padding(2, 6, left=False),
    }  # fmt: skip


def idefics2() -> Made:
    """Two images of another size each, the smaller one padded."""
    text = {**LLAMA, "model_type": "mistral"}
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = transformers.Idefics2Config(
        vision_config={**_VISION, "image_size": 56},
        perceiver_config=perceiver,
        text_config=text,
        image_token_id=IMAGE,
    )
    seen = torch.ones(2, 1, 56, 56, dtype=torch.bool)
    seen[1, 0, 28:] = seen[1, 0, :, 42:] = False
    return randomised(transformers.Idefics2ForConditionalGeneration(config)), {
        **with_image(4, (5, 9)), "pixel_values": draw(2, 1, 3, 56, 56), "pixel_attention_mask": seen
    }  # fmt: skip


def idefics3() -> Made:
    config = transformers.Idefics3Config(
        vision_config={**_VISION, "image_size": 56}, text_config=LLAMA, image_token_id=IMAGE, scale_factor=2
    )
    seen = torch.ones(2, 1, 56, 56, dtype=torch.bool)
    seen[1, 0, :, 28:] = False
    return randomised(transformers.Idefics3ForConditionalGeneration(config)), {
        **with_image(4, (5, 9)), "pixel_values": draw(2, 1, 3, 56, 56), "pixel_attention_mask": seen
    }  # fmt: skip


def fuyu() -> Made:
    text = {
        "model_type": "persimmon", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
        "vocab_size": 64, "max_position_embeddings": 64, "qk_layernorm": True, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.FuyuConfig(text_config=text, patch_size=14, image_token_id=IMAGE, hidden_size=32)
    model = randomised(transformers.FuyuForCausalLM(config))
    patches = (
        "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "image_patches"
    )
    return model, {**with_image(4, (5, 9)), patches: draw(2, 4, 588)}


def _grids(
    merged: tuple[int, ...], lengths: tuple[int, ...], start: int | None = None
) -> dict[str, torch.Tensor]:
    """Texts with one image each of its own number of merged patches, padded on the right."""
    texts = []
    for row, (tokens, length) in enumerate(zip(merged, lengths, strict=True)):
        text = ids_of(1, length, seed=row)[0]
        mark = torch.empty(0, dtype=torch.int64) if start is None else torch.tensor([start])
        texts.append(torch.cat([text[:2], mark, torch.full((tokens,), IMAGE), text[2:]]))
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}


def qwen2_vl() -> Made:
    text = {
        **LLAMA, "model_type": "qwen2_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    config = transformers.Qwen2VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
    )
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]])
    return randomised(transformers.Qwen2VLForConditionalGeneration(config)), {
        **_grids((6, 2), (6, 8), 62), "pixel_values": draw(32, 3 * 2 * 14 * 14), "image_grid_thw": grid
    }  # fmt: skip


def qwen3_vl_moe() -> Made:
    text = {
        **LLAMA, "model_type": "qwen3_vl_moe_text", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2,
        "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]])
    return randomised(transformers.Qwen3VLMoeForConditionalGeneration(config)), {
        **_grids((6, 2), (6, 8), 62), "pixel_values": draw(32, 3 * 2 * 14 * 14), "image_grid_thw": grid
    }  # fmt: skip


def ernie() -> Made:
    text = {
        **LLAMA, "model_type": "ernie4_5_vl_moe_text", "moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Ernie4_5_VLMoeConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_start_token_id=62, image_end_token_id=63,
        video_token_id=61, video_start_token_id=58, video_end_token_id=59,
    )  # fmt: skip
    inputs = _grids((6, 2), (6, 8), 62)
    inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] >= IMAGE).int()
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]])
    return randomised(transformers.Ernie4_5_VLMoeForConditionalGeneration(config)), {
        **inputs, "pixel_values": draw(32, 3 * 14 * 14), "image_grid_thw": grid
    }  # fmt: skip


def aria() -> Made:
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 64,
        "num_key_value_heads": 2, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "pad_token_id": 0,
        "model_type": "aria_text",
    }  # fmt: skip
    vision = {**_VISION, "image_size": 56, "model_type": "idefics3_vision"}
    config = transformers.AriaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projector_patch_to_query_dict={16: 4}
    )
    seen = torch.ones(2, 56, 56, dtype=torch.bool)
    seen[1, :, 28:] = False
    return randomised(transformers.AriaForConditionalGeneration(config)), {
        **with_image(4, (5, 9)), "pixel_values": draw(2, 3, 56, 56), "pixel_mask": seen
    }  # fmt: skip


MORE: dict[str, Callable[[], Made]] = {
    "blip2": blip2, "instructblip": instructblip, "idefics2": idefics2, "idefics3": idefics3, "fuyu": fuyu,
    "qwen2_vl": qwen2_vl, "qwen3_vl_moe": qwen3_vl_moe, "ernie": ernie, "aria": aria,
}  # fmt: skip
ALL = MODELS | MORE
