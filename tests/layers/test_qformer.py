"""The Q-Former against the published computation written out densely, its two passes, its padding, and its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from published_qformer import CONFIG, Published, State, lavis_state
from torch import Tensor

from mmkernels import weights
from mmkernels.layers import QFormer, QFormerConfig
from mmkernels.layers.qformer_layer import Keys

TEXT, IMAGE = 5, 7
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "holes": [[0, 1, 0, 1, 0], [1, 1, 0, 0, 1]],
}


def _qformer(state: State | None = None, config: QFormerConfig = CONFIG) -> QFormer:
    module = QFormer(config).double().eval()
    weights.load(module, lavis_state(config) if state is None else state, source="lavis")
    return module


def _inputs(padding: str = "none") -> dict[str, Any]:
    random = torch.Generator().manual_seed(3)
    mask = MASKS[padding]
    return {
        "image": torch.randn(2, IMAGE, CONFIG.image_width, generator=random, dtype=torch.float64),
        "text_ids": torch.randint(CONFIG.vocab, (2, TEXT), generator=random),
        "text_mask": None if mask is None else torch.tensor(mask, dtype=torch.bool),
    }


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("mode", ["itc", "itg", "itm", "instruct"])
def test_every_mode_is_the_published_computation(mode: str, padding: str) -> None:
    x = _inputs(padding)
    mask = torch.ones(2, TEXT, dtype=torch.bool) if x["text_mask"] is None else x["text_mask"]
    oracle, module = Published(lavis_state()), _qformer()
    hidden, expected = module(**x, mode=mode), oracle(x["image"], x["text_ids"], mask, mode)
    torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
    text = hidden[:, CONFIG.num_query :]
    torch.testing.assert_close(module.lm_head(text), oracle.logits(text), rtol=1e-9, atol=1e-9)


def test_gradients_are_the_published_computation_s() -> None:
    x, state = _inputs("left"), lavis_state()
    mask, state = x["text_mask"], {name: value.requires_grad_() for name, value in state.items()}
    image = x["image"].requires_grad_()
    module = _qformer({name: value.detach() for name, value in state.items()})
    ours = [*torch.autograd.grad(module(**x, mode="itm").square().sum(), (image, module.image_kv.weight))]
    keys = [
        f"bert.encoder.layer.{i}.crossattention.self.{part}.weight"
        for i in (0, 2)
        for part in ("key", "value")
    ]
    loss = Published(state)(image, x["text_ids"], mask, "itm").square().sum()
    first, *rest = torch.autograd.grad(loss, (image, *(state[key] for key in keys)))
    torch.testing.assert_close(ours, [first, torch.cat(rest)], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("padding", MASKS)
def test_generation_in_two_passes_equals_one(padding: str) -> None:
    x, module = _inputs(padding), _qformer()
    cache: list[Any] = []
    queries = module(x["image"], cache=cache)
    text = module(None, text_ids=x["text_ids"], text_mask=x["text_mask"], mode="itg", cache=cache)
    torch.testing.assert_close(torch.cat([queries, text], 1), module(**x, mode="itg"), rtol=1e-12, atol=1e-12)
    assert len(cache) == CONFIG.layers
    both = torch.autograd.grad(text.square().sum(), module.query_tokens, retain_graph=True)[0]
    one = torch.autograd.grad(
        module(**x, mode="itg")[:, CONFIG.num_query :].square().sum(), module.query_tokens
    )[0]
    torch.testing.assert_close(both, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", MASKS)
def test_contrast_needs_no_second_pass(padding: str) -> None:
    x, module = _inputs(padding), _qformer()
    alone = module(None, text_ids=x["text_ids"], text_mask=x["text_mask"], mode="itc")
    both = module(**x, mode="itc")
    torch.testing.assert_close(both, torch.cat([module(x["image"]), alone], 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x["image"], mode="itc"), module(x["image"]), rtol=0, atol=0)


def test_padded_image_tokens_change_no_bit() -> None:
    x = _inputs()
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    found = []
    for fill in (0.0, math.nan, math.inf):
        module = _qformer().float()
        image = torch.where(mask[..., None], x["image"].float(), fill).requires_grad_()
        hidden = module(image, text_ids=x["text_ids"], image_mask=mask, mode="itm")
        hidden.square().sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        found.append([hidden.detach(), image.grad, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not found[0][1][~mask].any()
    alone = _qformer()(x["image"][:1, mask[0]], text_ids=x["text_ids"][:1], mode="itm")
    torch.testing.assert_close(found[0][0][:1].double(), alone, rtol=1e-4, atol=1e-4)


def test_padded_text_changes_nothing_and_an_empty_image_is_not_seen() -> None:
    x, module = _inputs("left"), _qformer()
    hidden = module(**x, mode="instruct")
    x["text_ids"] = torch.where(x["text_mask"], x["text_ids"], 7)
    other = module(**x, mode="instruct")
    kept = torch.cat([torch.ones(2, CONFIG.num_query, dtype=torch.bool), x["text_mask"]], 1)
    assert torch.equal(hidden[kept], other[kept]) and not torch.equal(hidden, other)
    nothing = torch.zeros(2, IMAGE, dtype=torch.bool)
    assert torch.equal(module(x["image"], image_mask=nothing), module(-x["image"], image_mask=nothing))


def test_dropout_follows_torch_s_seed() -> None:
    x, module = _inputs("right"), _qformer().float().train()
    x["image"] = x["image"].float()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(**x, mode="itm")

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert not torch.allclose(run(0), module.eval()(**x, mode="itm"))


def test_attention_dropout_alone_keeps_the_mean() -> None:
    config = QFormerConfig(
        hidden=16, layers=1, heads=2, ffn=8, image_width=12, num_query=3, vocab=0, dropout=0.3
    )
    module = _qformer(config=config)
    layer, x = module.layers[0].train(), _inputs()["image"]
    layer._drop = lambda t: t  # type: ignore[method-assign]
    keys = module.image_kv(x).unflatten(-1, (2, 2, 8)).unbind(2)
    q, hi = torch.randn(2, 3, 2, 8, dtype=torch.float64), torch.full((2, 3), IMAGE, dtype=torch.int32)
    torch.manual_seed(0)
    drawn = torch.stack([layer._attend(q, Keys(*keys, torch.zeros_like(hi), hi)) for _ in range(600)])
    exact = layer.eval()._attend(q, Keys(*keys, torch.zeros_like(hi), hi))
    assert (drawn.std(0) > 0).all()
    assert ((drawn.mean(0) - exact).abs() <= 5 * drawn.std(0) / math.sqrt(600)).all()


def test_published_size() -> None:
    with torch.device("meta"):
        full, second_stage = QFormer(QFormerConfig()), QFormer(QFormerConfig(vocab=0))
    count = sum(p.numel() for p in full.parameters())
    assert abs(count / 188e6 - 1) < 0.01
    text = 30_523 * 769 + 512 * 768 + 12 * (2 * 768 * 3072 + 3072 + 3 * 768) + 768 * 768 + 3 * 768
    assert count - sum(p.numel() for p in second_stage.parameters()) == text


def test_queries_alone_load_from_files_without_text() -> None:
    config = QFormerConfig(hidden=16, layers=3, heads=2, ffn=24, image_width=12, num_query=3, vocab=0)
    state = {k: v for k, v in lavis_state().items() if k in lavis_state(config)}
    image = _inputs()["image"]
    for source in ("lavis", "xcomposer"):
        module = QFormer(config).double().eval()
        weights.load(module, state, source=source)
        torch.testing.assert_close(module(image), _qformer()(image), rtol=0, atol=0)
    with pytest.raises(ValueError, match="this Q-Former has no text branch"):
        module(image, text_ids=_inputs()["text_ids"], mode="itm")


def test_files_are_read_strictly() -> None:
    state = lavis_state()
    decoder = {"cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"]}
    weights.load(_qformer(), {**state, **decoder}, source="lavis")
    without = {k: v for k, v in state.items() if not k.startswith("cls.")}
    weights.load(_qformer(), without, source="lavis_instruct")  # published without a head
    with pytest.raises(ValueError, match=r"missing: cls\.predictions"):
        weights.load(_qformer(), without, source="lavis")
    key = "bert.encoder.layer.2.crossattention.self.value.bias"
    with pytest.raises(ValueError, match=f"missing: {key}"):
        weights.load(_qformer(), {k: v for k, v in state.items() if k != key}, source="lavis")
    with pytest.raises(ValueError, match="left over: extra"):
        weights.load(_qformer(), {**state, "extra": state[key]}, source="lavis")


_IDS = torch.zeros(2, 4, dtype=torch.int64)
_PICTURE = torch.zeros(2, IMAGE, CONFIG.image_width, dtype=torch.float64)
_BAD = [
    ({"mode": "mlm"}, ValueError, "mode: got 'mlm', expected one of 'queries'"),
    ({"image": None}, ValueError, "image: got None in mode 'queries'"),
    ({"image": None, "mode": "itc"}, ValueError, "image: got None in mode 'itc'"),
    ({"image": None, "mode": "itg", "text_ids": _IDS}, ValueError, "image: got None in mode 'itg'"),
    ({"mode": "itm"}, ValueError, "text_ids: got None in mode 'itm'"),
    ({"text_ids": _IDS}, ValueError, 'text_ids: got text in mode "queries"'),
    ({"image": _PICTURE[..., :3]}, ValueError, r"image: got shape \(2, 7, 3\)"),
    ({"mode": "itm", "text_ids": _IDS[:1]}, ValueError, r"text_ids: got shape \(1, 4\).*B = 2"),
    ({"mode": "itm", "text_ids": _IDS, "text_mask": _IDS}, TypeError, "text_mask: got torch.int64"),
    ({"mode": "itm", "text_ids": _IDS + 20}, ValueError, "text_ids: got ids 20 to 20, expected 0 to 19"),
    (
        {"mode": "itm", "text_ids": _IDS.repeat(1, 3)},
        ValueError,
        "12 tokens, expected at most max_positions = 9",
    ),
    ({"mode": "itg", "text_ids": _IDS, "cache": []}, ValueError, "cache: got one of 0 layers in mode 'itg'"),
    ({"image_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"image_mask: got shape \(2, 3\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), _BAD)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _qformer()(**{"image": _PICTURE, **change})


def test_bad_configs_are_named() -> None:
    with pytest.raises(ValueError, match="heads: got 5, expected a divisor of hidden = 16"):
        QFormer(QFormerConfig(hidden=16, heads=5))
    with pytest.raises(ValueError, match="num_query: got 0"):
        QFormer(QFormerConfig(num_query=0))


def test_compiles_in_one_graph() -> None:
    x, module = _inputs("left"), _qformer()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**x, mode="itg"), module(**x, mode="itg"))
