"""Against the Q-Formers of Hugging Face's BLIP-2 and InstructBLIP: forward and every gradient, through published names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkernels import weights
from mmkernels.layers import QFormer, QFormerConfig

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "encoder_hidden_size": 24,
    "vocab_size": 50, "max_position_embeddings": 16,
}  # fmt: skip
QUERIES, TEXT, IMAGE = 5, 6, 9
# theirs makes additive masks and softmax in float32 at least; ours is exact in float64
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}


class _Blip2(nn.Module):
    """BLIP-2's parts as its models hold them: queries, text embeddings and Q-Former side by side."""

    def __init__(self, text: bool) -> None:
        from transformers.models.blip_2 import modeling_blip_2 as blip

        super().__init__()
        config = transformers.Blip2QFormerConfig(**SIZES, use_qformer_text_input=text)
        config._attn_implementation = "eager"
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, 32))
        if text:
            self.embeddings = blip.Blip2TextEmbeddings(config)
        self.qformer = blip.Blip2QFormerModel(config)

    def forward(
        self, image: Tensor, ids: Tensor | None, text_mask: Tensor | None, image_mask: Tensor
    ) -> Tensor:
        queries = self.query_tokens.expand(image.shape[0], -1, -1)
        x = queries if ids is None else self.embeddings(input_ids=ids, query_embeds=queries)
        mask = None if ids is None else torch.cat([torch.ones(queries.shape[:2]), text_mask], 1)
        return self.qformer(
            query_embeds=x, query_length=QUERIES, attention_mask=mask, encoder_hidden_states=image,
            encoder_attention_mask=image_mask,
        ).last_hidden_state  # fmt: skip


class _InstructBlip(nn.Module):
    def __init__(self) -> None:
        from transformers.models.instructblip import modeling_instructblip as blip

        super().__init__()
        config = transformers.InstructBlipQFormerConfig(**SIZES)
        config._attn_implementation = "eager"
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, 32))
        self.qformer = blip.InstructBlipQFormerModel(config)

    def forward(self, image: Tensor, ids: Tensor, text_mask: Tensor, image_mask: Tensor | None) -> Tensor:
        queries = self.query_tokens.expand(image.shape[0], -1, -1)
        mask = torch.cat([torch.ones(queries.shape[:2]), text_mask], 1)
        return self.qformer(
            input_ids=ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=image,
            encoder_attention_mask=image_mask,
        ).last_hidden_state  # fmt: skip


def _ours(text: bool) -> QFormer:
    vocab = SIZES["vocab_size"] if text else 0
    return QFormer(
        QFormerConfig(32, 4, 4, 48, image_width=24, num_query=QUERIES, vocab=vocab, max_positions=16)
    )


def _renamed(ours: QFormer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names -> under ours, by the published table: joining rows is linear, so gradients may pass too."""
    state = {key.removeprefix("qformer."): value for key, value in state.items()}
    found = {}
    for rule in ours.published("huggingface").rules:
        for name in ours.state_dict():
            keys = rule.sources(name)
            if keys is not None and all(key in state for key in keys):
                found[name] = rule.value([state[key] for key in keys])
    return found


def _close(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    worst, size = (float(t.detach().abs().max()) for t in (ours - theirs, theirs))
    assert worst <= tolerance * (1 + size), f"{what}: off by {worst:.3g} where values reach {size:.3g}"


def _compare(theirs: nn.Module, ours: QFormer, run: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    random, dtype = torch.Generator().manual_seed(5), inputs["image"].dtype
    theirs, ours = theirs.to(dtype).eval(), ours.to(dtype).eval()
    with torch.no_grad():  # initial biases of zero and norms of one would hide mistakes
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random, dtype=dtype))
    state = {key.removeprefix("qformer."): value for key, value in theirs.state_dict().items()}
    weights.load(ours, state, source="huggingface")
    images = [inputs["image"].clone().requires_grad_() for _ in range(2)]
    rest = (inputs["ids"], inputs["text_mask"], inputs["image_mask"])
    y, z = run(images[0], *rest), theirs(images[1], *rest)
    _close("output", y, z, TOLERANCE[dtype])
    weight = torch.randn(z.shape, generator=random, dtype=dtype)
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    _close("gradient of the image", images[0].grad, images[1].grad, TOLERANCE[dtype])
    expected = _renamed(ours, {k: p.grad for k, p in theirs.named_parameters()})
    met = {name for name, p in ours.named_parameters() if not name.startswith("lm_")}
    assert met == set(expected)
    for name, parameter in ours.named_parameters():
        if name in met:
            _close(f"gradient of {name}", parameter.grad, expected[name], TOLERANCE[dtype])


def _inputs(dtype: torch.dtype, padding: str) -> dict[str, Any]:
    mask = torch.ones(3, TEXT, dtype=torch.bool)
    if padding == "left":
        mask[0, :2] = mask[1, :5] = False
    if padding == "right":
        mask[0, 4:] = mask[2, 1:] = False
    image_mask = torch.ones(3, IMAGE, dtype=torch.bool)
    image_mask[1, 4:] = image_mask[2, ::2] = False
    return {
        "image": torch.randn(3, IMAGE, 24, dtype=dtype), "ids": torch.randint(1, 50, (3, TEXT)), "text_mask": mask,
        "image_mask": image_mask,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blip2_queries(dtype: torch.dtype) -> None:
    ours, inputs = _ours(text=False), _inputs(dtype, "left") | {"ids": None, "text_mask": None}
    _compare(_Blip2(text=False), ours, lambda i, t, m, im: ours(i, image_mask=im), inputs)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blip2_matching(dtype: torch.dtype, padding: str) -> None:
    ours = _ours(text=True)

    def run(image: Tensor, ids: Tensor, mask: Tensor, image_mask: Tensor | None) -> Tensor:
        return ours(image, text_ids=ids, text_mask=mask, image_mask=image_mask, mode="itm")

    # with text, theirs builds the image's mask for all rows and fails on the query rows: no image padding here
    _compare(_Blip2(text=True), ours, run, _inputs(dtype, padding) | {"image_mask": None})


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_instructblip(dtype: torch.dtype, padding: str) -> None:
    ours = _ours(text=True)

    def run(image: Tensor, ids: Tensor, mask: Tensor, image_mask: Tensor | None) -> Tensor:
        return ours(image, text_ids=ids, text_mask=mask, image_mask=image_mask, mode="instruct")

    _compare(_InstructBlip(), ours, run, _inputs(dtype, padding))
