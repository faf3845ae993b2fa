"""BLIP-2's first stage: every loss against its formula written out, what gets a gradient, and who may be a negative."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmkernels import weights
from mmkernels.layers import QFormerConfig, VisionConfig
from mmkernels.models.qformer import Stage1, Stage1Config
from mmkernels.models.qformer_stage1 import HeadsConfig, contrast, negatives, similarity

QFORMER = QFormerConfig(16, 3, 2, 24, image_width=12, num_query=3, vocab=20, max_positions=9, dropout=0.0)
HEADS = HeadsConfig(embed=8, bos=19)
B, L = 4, 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Stage1(Stage1Config(QFORMER, vision=None, heads=HEADS)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.heads.temp.fill_(0.3)
    return made


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, 4:] = mask[3, 2:] = False
    return torch.randn(B, 5, 12, dtype=torch.float64), torch.randint(2, 19, (B, L)), mask


def smoothed(scores, target):
    logs = scores.log_softmax(-1)
    return -(0.9 * logs[target] + 0.1 * logs.mean())


def test_contrast_is_the_published_formula(model, batch):
    image, ids, mask = batch
    queries = F.normalize(model.heads.vision_proj(model.qformer(image)), dim=-1)
    hidden = model.qformer(None, text_ids=ids, text_mask=mask, mode="itc")
    texts = F.normalize(model.heads.text_proj(hidden[:, 0]), dim=-1)
    total, s = 0.0, torch.empty(B, B, dtype=torch.float64)
    for i in range(B):
        for j in range(B):
            s[i, j] = max(queries[i, q] @ texts[j] for q in range(3)) / 0.3
    for i in range(B):
        total += smoothed(s[i], i) + smoothed(s[:, i], i)
    torch.testing.assert_close(model(*batch).itc, total / (2 * B))


def test_gathered_features_carry_no_gradient(model, batch):
    """In s_i2t only image features have one, in s_t2i only text features."""
    image, ids, mask = batch
    ours = torch.autograd.grad(
        model(*batch).itc, (model.heads.vision_proj.weight, model.heads.text_proj.weight)
    )
    queries = F.normalize(model.heads.vision_proj(model.qformer(image)), dim=-1)
    hidden = model.qformer(None, text_ids=ids, text_mask=mask, mode="itc")
    texts = F.normalize(model.heads.text_proj(hidden[:, 0]), dim=-1)
    own = torch.arange(B)
    i2t = F.cross_entropy(similarity(queries, texts.detach()) / 0.3, own, label_smoothing=0.1) / 2
    t2i = F.cross_entropy(similarity(queries.detach(), texts).T / 0.3, own, label_smoothing=0.1) / 2
    torch.testing.assert_close(ours[0], torch.autograd.grad(i2t, model.heads.vision_proj.weight)[0])
    torch.testing.assert_close(ours[1], torch.autograd.grad(t2i, model.heads.text_proj.weight)[0])


def test_the_temperature_divides_and_learns(model, batch):
    model(*batch).itc.backward()
    assert model.heads.temp.grad != 0
    fresh = Stage1(Stage1Config(QFORMER, vision=None, heads=HEADS))
    assert fresh.heads.temp.item() == pytest.approx(0.07)


def test_matching_is_the_published_formula(model, batch, monkeypatch):
    """With the draws known: pairs, texts with hard images, hard texts with images; logits averaged over the queries."""
    image, ids, mask = batch
    draws = iter([torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])])
    monkeypatch.setattr("mmkernels.models.qformer_stage1.negatives", lambda *_: next(draws))
    loss = model(*batch).itm
    total = 0.0
    for b in range(B):
        for i, t, label in ((b, b, 1), ([1, 2, 3, 0][b], b, 0), (b, [3, 0, 1, 2][b], 0)):
            hidden = model.qformer(
                image[i : i + 1], text_ids=ids[t : t + 1], text_mask=mask[t : t + 1], mode="itm"
            )
            total -= model.heads.itm_head(hidden[:, :3]).mean(1).log_softmax(-1)[0, label]
    torch.testing.assert_close(loss, total / (3 * B))


def test_writing_is_the_published_formula(model, batch):
    """[DEC] in the first place, shifted labels, padding left out, smoothing 0.1 over the vocabulary."""
    image, ids, mask = batch
    begun = ids.clone()
    begun[:, 0] = 19
    hidden = model.qformer(image, text_ids=begun, text_mask=mask, mode="itg")
    logs = model.qformer.lm_head(hidden[:, 3:]).log_softmax(-1)
    terms = [
        -(0.9 * logs[b, t - 1, ids[b, t]] + 0.1 * logs[b, t - 1].mean())
        for b in range(B)
        for t in range(1, L)
        if mask[b, t]
    ]
    torch.testing.assert_close(model(*batch).lm, sum(terms) / len(terms))


def test_the_loss_is_the_sum_and_trains_every_parameter(model, batch):
    losses = model(*batch)
    torch.testing.assert_close(losses.loss, losses.itc + losses.itm + losses.lm)
    losses.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_image_ids_share_positives_and_forbid_negatives():
    scores = torch.randn(3, 4, dtype=torch.float64)
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    logs, share = scores.log_softmax(1), 0.1 / 4
    rows = (
        -(0.45 + share) * (logs[0, 0] + logs[0, 2]) - share * (logs[0, 1] + logs[0, 3]),
        -(0.9 + share) * logs[1, 1] - share * (logs[1, 0] + logs[1, 2] + logs[1, 3]),
        -(0.45 + share) * (logs[2, 0] + logs[2, 2]) - share * (logs[2, 1] + logs[2, 3]),
    )
    torch.testing.assert_close(contrast(scores, same, soft=True), sum(rows) / 3)
    drawn = {tuple(negatives(scores, same).tolist()) for _ in range(100)}
    assert {d[0] for d in drawn} == {d[2] for d in drawn} == {1, 3}
    assert {d[1] for d in drawn} == {0, 2, 3}


def test_negatives_are_drawn_by_softmax():
    """Odds 0, 1/7, 2/7, 4/7; the generator decides."""
    scores = torch.tensor([[50.0, 0.0, math.log(2), math.log(4)]]).expand(7000, 4)
    same = torch.zeros(7000, 4, dtype=torch.bool)
    same[:, 0] = True
    draw = negatives(scores, same, torch.Generator().manual_seed(0))
    assert torch.equal(draw, negatives(scores, same, torch.Generator().manual_seed(0)))
    assert draw.bincount(minlength=4).tolist() == pytest.approx([0, 1000, 2000, 4000], abs=120)


def test_padding_changes_nothing(model, batch):
    image, ids, mask = batch
    other = torch.where(mask, ids, 7)
    ours, changed = (model(image, i, mask, generator=torch.Generator().manual_seed(3)) for i in (ids, other))
    torch.testing.assert_close(ours, changed)


def test_one_sample_alone_is_finite(model, batch):
    image, ids, mask = batch
    assert all(x.isfinite() for x in model(image[:1], ids[:1], mask[:1]))


def test_bad_input_is_named(model, batch):
    image, ids, mask = batch
    with pytest.raises(ValueError, match="attention_mask: got a row whose first token is padding"):
        model(image, ids, mask.flip(1))
    with pytest.raises(ValueError, match="input_ids: got 1 tokens"):
        model(image, ids[:, :1])
    with pytest.raises(ValueError, match="image_ids"):
        model(image, ids, mask, torch.arange(B + 1))
    with pytest.raises(ValueError, match=r"vocab: got 0, expected more than bos"):
        Stage1(Stage1Config(QFormerConfig(vocab=0), vision=None))


def test_the_released_file_s_names():
    """LAVIS' stage-1 file: tower, norm and heads at the top, the queries beside the Q-Former."""
    tower = VisionConfig(28, 14, 12, 1, 2, 24, pre_norm=False, patch_bias=True, keep_class=True)
    model = Stage1(Stage1Config(QFORMER, tower, HEADS))
    table, state = model.published("lavis"), {}
    for name, value in model.state_dict().items():
        rule = next(r for r in table.rules if r.sources(name) is not None)
        keys = rule.sources(name)
        if name == "vision.patch.weight":
            state[keys[0]] = torch.randn(12, 3, 14, 14)
        elif len(keys) == 1:
            state[keys[0]] = torch.randn(value.shape if rule.view is None else (1, *value.shape))
        else:
            rows = len(value) // (3 if name.endswith("qkv.bias") and len(keys) == 2 else len(keys))
            state |= {key: torch.randn(rows, *value.shape[1:]) for key in keys}
    expected = {
        "temp", "itm_head.bias", "vision_proj.weight", "text_proj.bias", "ln_vision.weight", "query_tokens",
        "visual_encoder.blocks.0.attn.q_bias", "visual_encoder.blocks.0.attn.v_bias", "visual_encoder.cls_token",
        "Qformer.bert.embeddings.LayerNorm.weight", "Qformer.cls.predictions.bias",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight",
        "Qformer.bert.encoder.layer.1.output_query.dense.bias", "Qformer.bert.encoder.layer.1.intermediate.dense.weight",
    }  # fmt: skip
    assert expected <= set(state)
    weights.load(model, state, source="lavis")
    assert torch.equal(model.qformer.query_tokens, state["query_tokens"][0])
    qkv, width = model.vision.blocks[0].attention.qkv.bias, 12
    assert torch.equal(qkv[:width], state["visual_encoder.blocks.0.attn.q_bias"])
    assert not qkv[width : 2 * width].any()
    without = {key: value for key, value in state.items() if not key.startswith("visual_encoder.")}
    weights.load(model, without, source="lavis")  # what was frozen is often left out
    without.pop("itm_head.bias")
    with pytest.raises(ValueError, match=r"missing: itm_head\.bias"):
        weights.load(model, without, source="lavis")
