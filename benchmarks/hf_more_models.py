"""More Hugging Face models: Q-Formers, resamplers, packed vision, experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.hf_models import (
    IMAGE,
    MODELS,
    VOCAB,
    Made,
    Sizes,
    draw,
    ids_of,
    llama,
    randomised,
    vision,
    with_images,
)


def _qformer(z: Sizes) -> dict[str, Any]:
    return {
        "num_hidden_layers": z.layers + 1, "hidden_size": z.width, "num_attention_heads": z.heads,
        "intermediate_size": z.hidden, "cross_attention_frequency": 2, "encoder_hidden_size": z.width, "vocab_size": 40,
        "max_position_embeddings": 64,
    }  # fmt: skip


def blip2(z: Sizes) -> Made:
    text = {
        "model_type": "opt", "hidden_size": z.width, "num_hidden_layers": z.layers, "ffn_dim": z.hidden,
        "num_attention_heads": z.heads, "word_embed_proj_dim": z.width, "vocab_size": VOCAB, "dropout": 0.0, "pad_token_id": 0,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision(z), qformer_config=_qformer(z), text_config=text, image_token_index=IMAGE,
        num_query_tokens=z.latents,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config)
    inputs = with_images(z, [z.latents] * 2, left=False)
    return randomised(model), {**inputs, "pixel_values": draw(2, 3, z.image, z.image)}


def instructblip(z: Sizes) -> Made:
    config = transformers.InstructBlipConfig(
        vision_config=vision(z), qformer_config=_qformer(z), text_config=llama(z), image_token_index=IMAGE,
        num_query_tokens=z.latents,
    )  # fmt: skip
    model = transformers.InstructBlipForConditionalGeneration(config)
    asked = torch.ones(2, 6, dtype=torch.int64)
    asked[1, 4:] = 0
    return randomised(model), {
        **with_images(z, [z.latents] * 2), "pixel_values": draw(2, 3, z.image, z.image),
        "qformer_input_ids": ids_of(2, 6, 40), "qformer_attention_mask": asked,
    }  # fmt: skip


def _two_sizes(z: Sizes) -> dict[str, torch.Tensor]:
    """Images of 2 x 2 tiles, the second padded."""
    side = 2 * z.image
    seen = torch.ones(2, 1, side, side, dtype=torch.bool)
    seen[1, 0, :, z.image :] = False
    return {"pixel_values": draw(2, 1, 3, side, side), "pixel_attention_mask": seen}


def idefics2(z: Sizes) -> Made:
    perceiver = {
        "hidden_size": z.width, "resampler_n_latents": z.latents, "resampler_depth": 2, "resampler_n_heads": z.heads,
        "resampler_head_dim": z.width // z.heads, "num_key_value_heads": z.kv_heads,
    }  # fmt: skip
    config = transformers.Idefics2Config(
        vision_config=vision(z, side=2),
        perceiver_config=perceiver,
        text_config=llama(z, "mistral"),
        image_token_id=IMAGE,
    )
    model = transformers.Idefics2ForConditionalGeneration(config)
    return randomised(model), {**with_images(z, [z.latents] * 2), **_two_sizes(z)}


def idefics3(z: Sizes) -> Made:
    config = transformers.Idefics3Config(
        vision_config=vision(z, side=2), text_config=llama(z), image_token_id=IMAGE, scale_factor=2
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    return randomised(model), {**with_images(z, [z.places] * 2), **_two_sizes(z)}


def fuyu(z: Sizes) -> Made:
    text = {**llama(z, "persimmon"), "qk_layernorm": True}
    del text["num_key_value_heads"]
    config = transformers.FuyuConfig(text_config=text, patch_size=14, image_token_id=IMAGE)
    model = randomised(transformers.FuyuForCausalLM(config))
    patches = (
        "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "image_patches"
    )
    return model, {**with_images(z, [z.places] * 2), patches: draw(2, z.places, 588)}


def _rope(z: Sizes, first: int) -> dict[str, Any]:
    """Angles shared among time, height and width: a half for `first` of them."""
    half = z.width // z.heads // 2
    parts = [half // 4] * 3
    parts[first] = half - half // 4 * 2
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": parts}


def _grids(z: Sizes, depth: int) -> dict[str, torch.Tensor]:
    """A large image and a small one, packed."""
    side = max(z.image // 14, 4)
    grid = torch.tensor([[1, side, side + 2], [1, 2, side]])
    inputs = with_images(z, (grid.prod(1) // 4).tolist(), left=False, start=62)
    ids = inputs["input_ids"]
    return {
        **inputs, "mm_token_type_ids": (ids == IMAGE).int(), "image_grid_thw": grid,
        "pixel_values": draw(int(grid.prod(1).sum()), depth * 14 * 14),
    }  # fmt: skip


def qwen2_vl(z: Sizes) -> Made:
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": z.vision_layers, "embed_dim": z.width, "hidden_size": z.width, "num_heads": z.heads, "patch_size": 14,
            "spatial_merge_size": 2,
        },
        text_config=llama(z, "qwen2_vl_text", rope_parameters=_rope(z, 0)), image_token_id=IMAGE, video_token_id=61,
        vision_start_token_id=62,
    )  # fmt: skip
    return randomised(transformers.Qwen2VLForConditionalGeneration(config)), _grids(z, 6)


def qwen3_vl_moe(z: Sizes) -> Made:
    text = llama(
        z, "qwen3_vl_moe_text", head_dim=z.width // z.heads, num_experts=z.experts, num_experts_per_tok=2,
        moe_intermediate_size=z.expert_hidden, rope_parameters=_rope(z, 0),
    )  # fmt: skip
    of_vision = {
        "depth": z.vision_layers, "hidden_size": z.width, "intermediate_size": z.hidden, "num_heads": z.heads,
        "patch_size": 14, "spatial_merge_size": 2, "out_hidden_size": z.width, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(
        vision_config=of_vision, text_config=text, image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    return randomised(transformers.Qwen3VLMoeForConditionalGeneration(config)), _grids(z, 6)


def ernie(z: Sizes) -> Made:
    text = llama(
        z, "ernie4_5_vl_moe_text", moe_intermediate_size=[z.expert_hidden, z.expert_hidden // 2],
        moe_num_experts=z.experts, moe_k=2, moe_num_shared_experts=1, mlp_layer_types=["dense"] + ["sparse"] * (z.layers - 1),
        rope_parameters=_rope(z, 2),
    )  # fmt: skip
    of_vision = {
        "depth": z.vision_layers, "hidden_size": z.width, "intermediate_size": z.hidden, "num_heads": z.heads,
        "patch_size": 14, "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Ernie4_5_VLMoeConfig(
        vision_config=of_vision, text_config=text, image_token_id=IMAGE, image_start_token_id=62, image_end_token_id=63,
        video_token_id=61, video_start_token_id=58, video_end_token_id=59,
    )  # fmt: skip
    inputs = _grids(z, 3)
    inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] >= IMAGE).int()
    return randomised(transformers.Ernie4_5_VLMoeForConditionalGeneration(config)), inputs


def aria(z: Sizes) -> Made:
    text = {**llama(z, "aria_text"), "moe_num_experts": z.experts, "moe_topk": 2, "moe_num_shared_experts": 1}
    text["intermediate_size"] = z.expert_hidden
    config = transformers.AriaConfig(
        vision_config=vision(z, "idefics3_vision", side=2), text_config=text, image_token_index=IMAGE,
        projector_patch_to_query_dict={4 * z.places: z.latents},
    )  # fmt: skip
    images = _two_sizes(z)
    return randomised(transformers.AriaForConditionalGeneration(config)), {
        **with_images(z, [z.latents] * 2), "pixel_values": images["pixel_values"][:, 0],
        "pixel_mask": images["pixel_attention_mask"][:, 0],
    }  # fmt: skip


ALL: dict[str, Callable[[Sizes], Made]] = MODELS | {
    "idefics2": idefics2, "idefics3": idefics3, "blip2": blip2, "instructblip": instructblip, "fuyu": fuyu,
    "qwen2_vl": qwen2_vl, "qwen3_vl_moe": qwen3_vl_moe, "ernie": ernie, "aria": aria,
}  # fmt: skip
