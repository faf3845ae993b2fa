"""Tiny models of Hugging Face with random weights and inputs of theirs: `MODELS[name]()` gives (model, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
IMAGE = 60


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that hide no mistake: nothing is zero or one, gates are open."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(
                scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.7
            )
    return model.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids_of(batch: int, length: int, vocab: int = 50, seed: int = 2) -> Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, *, left: bool) -> Tensor:
    """The first row whole, every other shorter by three."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, :3] = 0
    return mask if left else mask.flip(1)


def mixtral(*, left: bool = True, **changes: Any) -> Made:
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    model = randomised(transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**sizes, **changes})))
    return model, {"input_ids": ids_of(2, 9), "attention_mask": padding(2, 9, left=left)}


def idefics(**changes: Any) -> Made:
    """Three images; texts that see one of them, none at first, and two that are not neighbours."""
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2,
        "additional_vocab_size": 0, "cross_layer_interval": 1, "use_resampler": True, "alpha_type": "float",
        "vision_config": {
            "embed_dim": 24, "image_size": 28, "patch_size": 14, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 32,
        },
        "perceiver_config": {
            "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 3, "resampler_head_dim": 8,
        },
    }  # fmt: skip
    model = randomised(
        transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**{**sizes, **changes}))
    )
    seen = torch.zeros(2, 9, 3, dtype=torch.int64)
    seen[0, 1:4, 0] = seen[0, 4:, 1] = seen[1, 3:, 2] = 1
    return model, {
        "input_ids": ids_of(2, 9), "attention_mask": padding(2, 9, left=False), "pixel_values": draw(2, 3, 3, 28, 28),
        "image_attention_mask": seen,
    }  # fmt: skip


def idefics_holes() -> Made:
    """Rows that see images 0 and 2 but not 1."""
    model, inputs = idefics()
    inputs["image_attention_mask"][0, 4:] = torch.tensor([1, 0, 1])
    return model, inputs


def mllama() -> Made:
    text = {
        "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64,
        "num_key_value_heads": 2, "cross_attention_layers": [1], "max_position_embeddings": 128, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 48,
        "image_size": 28, "patch_size": 14, "max_num_tiles": 4, "intermediate_layers_indices": [0], "vision_output_dim": 64,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]],
    }  # fmt: skip
    model = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    seen = torch.zeros(2, 9, 1, 4, dtype=torch.int64)
    seen[0, 2:, 0, :2] = seen[1, 4:, 0, :4] = 1
    tiles = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 1]]])
    return randomised(model), {
        "input_ids": ids_of(2, 9), "attention_mask": padding(2, 9, left=False), "cross_attention_mask": seen,
        "pixel_values": draw(2, 1, 4, 3, 28, 28), "aspect_ratio_ids": torch.tensor([[2], [4]]), "aspect_ratio_mask": tiles,
    }  # fmt: skip


def with_image(tokens: int, lengths: tuple[int, ...], *, left: bool = True) -> dict[str, Tensor]:
    """Texts with one image of `tokens` each, padded to the longest."""
    longest = tokens + max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), longest, dtype=torch.int64),
        torch.zeros(len(lengths), longest, dtype=torch.int64),
    )
    for row, length in enumerate(lengths):
        text = ids_of(1, length, seed=row)[0]
        own = torch.cat([text[:2], torch.full((tokens,), IMAGE), text[2:]])
        where = slice(longest - len(own), None) if left else slice(0, len(own))
        ids[row, where], mask[row, where] = own, 1
    return {"input_ids": ids, "attention_mask": mask}


def llava() -> Made:
    config = transformers.LlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE)
    return randomised(transformers.LlavaForConditionalGeneration(config)), {
        **with_image(4, (5, 9)), "pixel_values": draw(2, 3, 28, 28)
    }  # fmt: skip


def llava_next() -> Made:
    """A wide and a tall image: another number of patches each."""
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config=LLAMA,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    model = randomised(transformers.LlavaNextForConditionalGeneration(config))
    sizes = torch.tensor([[28, 56], [56, 56]])
    pixels = draw(2, 5, 3, 28, 28)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes).pooler_output
    longest = max(len(f) for f in features) + 6
    ids, mask = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest, dtype=torch.int64)
    for row, feature in enumerate(features):
        own = torch.cat([ids_of(1, 2)[0], torch.full((len(feature),), IMAGE), ids_of(1, 4)[0]])
        ids[row, longest - len(own) :], mask[row, longest - len(own) :] = own, 1
    return model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": sizes}


def llava_onevision() -> Made:
    text = {**LLAMA, "model_type": "qwen2"}
    vision = {**CLIP, "model_type": "siglip_vision_model"}
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-1,
    )  # fmt: skip
    model = randomised(transformers.LlavaOnevisionForConditionalGeneration(config))
    sizes, pixels = torch.tensor([[28, 56], [56, 56]]), draw(2, 5, 3, 28, 28)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes).pooler_output
    longest = max(len(f) for f in features) + 6
    ids, mask = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest, dtype=torch.int64)
    for row, feature in enumerate(features):
        own = torch.cat([ids_of(1, 2)[0], torch.full((len(feature),), IMAGE), ids_of(1, 4)[0]])
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    return model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": sizes}


MODELS: dict[str, Callable[[], Made]] = {
    "mixtral": mixtral, "mixtral_right": lambda: mixtral(left=False), "mixtral_window": lambda: mixtral(sliding_window=4),
    "idefics": idefics, "idefics_vector": lambda: idefics(alpha_type="vector"), "idefics_holes": idefics_holes,
    "idefics_qk_norm": lambda: idefics(qk_layer_norms=True), "mllama": mllama, "llava": llava, "llava_next": llava_next,
    "llava_onevision": llava_onevision,
}  # fmt: skip
