"""Hugging Face models of any size with random weights, and inputs of theirs: `MODELS[name](sizes)` gives (model, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
IMAGE, VOCAB = 60, 64


@dataclass(frozen=True)
class Sizes:
    width: int = 32
    hidden: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vision_layers: int = 2
    image: int = 28  # a tile's side, patches of 14
    texts: tuple[int, ...] = (9, 6)  # lengths of the batch's texts
    images: int = 3  # of a text that has several
    latents: int = 4
    experts: int = 4
    expert_hidden: int = 24

    @property
    def places(self) -> int:
        return (self.image // 14) ** 2


def llama(z: Sizes, kind: str = "llama", **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": z.width, "num_hidden_layers": z.layers, "intermediate_size": z.hidden,
        "num_attention_heads": z.heads, "num_key_value_heads": z.kv_heads, "vocab_size": VOCAB,
        "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def vision(z: Sizes, kind: str | None = None, side: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": z.width, "intermediate_size": z.hidden, "num_hidden_layers": z.vision_layers,
        "num_attention_heads": z.heads, "image_size": side * z.image, "patch_size": 14,
        **({} if kind is None else {"model_type": kind}), **more,
    }  # fmt: skip


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that hide no mistake: nothing is zero or one, gates are open."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        many = parameter.dim() > 1
        value = torch.randn(parameter.shape, generator=generator) * (
            parameter.shape[-1] ** -0.5 if many else 0.3
        )
        with torch.no_grad():
            parameter.copy_(value + (0 if many else 0.7))
    return model.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids_of(batch: int, length: int, vocab: int = 50, seed: int = 2) -> Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(texts: list[Tensor], *, left: bool) -> dict[str, Tensor]:
    longest = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        where = slice(longest - len(text), None) if left else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(z: Sizes, *, left: bool = False) -> dict[str, Tensor]:
    return padded([ids_of(1, length, seed=row)[0] for row, length in enumerate(z.texts)], left=left)


def with_images(
    z: Sizes, places: list[int], *, left: bool = True, start: int | None = None
) -> dict[str, Tensor]:
    """Texts with one image each, of so many places."""
    texts = []
    mark = torch.empty(0, dtype=torch.int64) if start is None else torch.tensor([start])
    for row, (length, of_image) in enumerate(zip(z.texts, places, strict=True)):
        text = ids_of(1, length, seed=row)[0]
        texts.append(torch.cat([text[:2], mark, torch.full((of_image,), IMAGE), text[2:]]))
    return padded(texts, left=left)


def mixtral(z: Sizes, *, left: bool = True, **changes: Any) -> Made:
    sizes = {**llama(z, "mixtral"), "intermediate_size": z.expert_hidden, "num_local_experts": z.experts}
    config = transformers.MixtralConfig(**{**sizes, "num_experts_per_tok": 2, **changes})
    return randomised(transformers.MixtralForCausalLM(config)), plain(z, left=left)


def idefics(z: Sizes, *, holes: bool = False, **changes: Any) -> Made:
    """Texts with several images: a token sees the last before it, the first few none; with `holes` the first and the last."""
    sizes = {
        "hidden_size": z.width, "num_attention_heads": z.heads, "intermediate_size": z.hidden, "vocab_size": VOCAB,
        "num_hidden_layers": z.layers, "additional_vocab_size": 0, "cross_layer_interval": 1, "alpha_type": "float",
        "vision_config": {
            "embed_dim": z.width, "image_size": z.image, "patch_size": 14, "num_hidden_layers": z.vision_layers,
            "num_attention_heads": z.heads, "intermediate_size": z.hidden,
        },
        "use_resampler": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "perceiver_config": {
            "resampler_n_latents": z.latents, "resampler_depth": 2, "resampler_n_heads": z.heads,
            "resampler_head_dim": z.width // z.heads,
        },
    }  # fmt: skip
    model = randomised(
        transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**{**sizes, **changes}))
    )
    inputs = plain(z)
    batch, rows = inputs["input_ids"].shape
    time = (torch.arange(rows) + 1) * z.images // (rows - 1)  # none before the first, the last at the end
    seen = torch.nn.functional.one_hot(time.clamp(max=z.images), z.images + 1)[:, 1:]
    if holes:
        seen[rows // 2 :] = torch.tensor([1] + [0] * (z.images - 2) + [1])
    pixels = draw(batch, z.images, 3, z.image, z.image)
    return model, {
        **inputs,
        "pixel_values": pixels,
        "image_attention_mask": seen.expand(batch, -1, -1).contiguous(),
    }


def mllama(z: Sizes) -> Made:
    """Images of two and four tiles, which the text sees from its third and its fifth token on."""
    text = {**llama(z), "num_hidden_layers": z.layers + 1, "cross_attention_layers": [1]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    del text["model_type"]
    of_vision = {
        "hidden_size": z.width, "num_hidden_layers": z.vision_layers, "num_global_layers": 1, "attention_heads": z.heads,
        "intermediate_size": z.hidden, "image_size": z.image, "patch_size": 14, "max_num_tiles": 4,
        "intermediate_layers_indices": [0], "vision_output_dim": 2 * z.width,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]],
    }  # fmt: skip
    config = transformers.MllamaConfig(vision_config=of_vision, text_config=text, image_token_index=IMAGE)
    model, inputs = randomised(transformers.MllamaForConditionalGeneration(config)), plain(z)
    seen = torch.zeros(*inputs["input_ids"].shape, 1, 4, dtype=torch.int64)
    seen[0, 2:, 0, :2] = seen[1, 4:, 0, :4] = 1
    return model, {
        **inputs, "cross_attention_mask": seen, "pixel_values": draw(2, 1, 4, 3, z.image, z.image),
        "aspect_ratio_ids": torch.tensor([[2], [4]]), "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 1]]]),
    }  # fmt: skip


def llava(z: Sizes) -> Made:
    config = transformers.LlavaConfig(
        vision_config=vision(z, "clip_vision_model", projection_dim=32),
        text_config=llama(z),
        image_token_index=IMAGE,
    )
    inputs = with_images(z, [z.places] * 2)
    return randomised(transformers.LlavaForConditionalGeneration(config)), {
        **inputs,
        "pixel_values": draw(2, 3, z.image, z.image),
    }


def _anyres(model: Any, z: Sizes, *, left: bool) -> Made:
    """A large image and a small one: another number of tiles and of places each."""
    sizes = torch.tensor([[2 * z.image, 2 * z.image], [z.image // 2, z.image]])
    pixels = draw(2, 5, 3, z.image, z.image)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes).pooler_output
    inputs = with_images(z, [len(feature) for feature in features], left=left)
    return model, {**inputs, "pixel_values": pixels, "image_sizes": sizes}


def _pinpoints(z: Sizes) -> list[list[int]]:
    return [[z.image, 2 * z.image], [2 * z.image, z.image], [2 * z.image, 2 * z.image]]


def llava_next(z: Sizes) -> Made:
    config = transformers.LlavaNextConfig(
        vision_config=vision(z, "clip_vision_model", projection_dim=32), text_config=llama(z), image_token_index=IMAGE,
        image_grid_pinpoints=_pinpoints(z),
    )  # fmt: skip
    return _anyres(randomised(transformers.LlavaNextForConditionalGeneration(config)), z, left=True)


def llava_onevision(z: Sizes) -> Made:
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision(z, "siglip_vision_model"), text_config=llama(z, "qwen2"), image_token_index=IMAGE,
        image_grid_pinpoints=_pinpoints(z), vision_feature_layer=-1,
    )  # fmt: skip
    return _anyres(randomised(transformers.LlavaOnevisionForConditionalGeneration(config)), z, left=False)


MODELS: dict[str, Callable[[Sizes], Made]] = {
    "idefics": idefics, "mllama": mllama, "llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision,
    "mixtral": mixtral,
}  # fmt: skip
VARIANTS: dict[str, Callable[[Sizes], Made]] = {
    "idefics_vector": lambda z: idefics(z, alpha_type="vector"), "idefics_holes": lambda z: idefics(z, holes=True),
    "idefics_qk_norm": lambda z: idefics(z, qk_layer_norms=True), "mixtral_right": lambda z: mixtral(z, left=False),
    "mixtral_window": lambda z: mixtral(z, sliding_window=4),
}  # fmt: skip
