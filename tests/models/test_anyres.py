"""LLaVA-NeXT's tiles: the joined map against the authors' steps, worked examples, batches, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_llava import joined
from test_llava import small

from mmkernels import models
from mmkernels.data import slicing
from mmkernels.models.llava import merge_anyres

KINDS = ("unpad", "spatial", "flat", "maxpool2x2", "unpad_nobase", "anyres_max_1", "anyres_max_2")


def _drawn(plan: slicing.Plan, side: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(plan.views, side * side, width, dtype=torch.float64, requires_grad=True)
    return features, torch.randn(width, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rounding", ["llava", "hf"])
@pytest.mark.parametrize("merge", KINDS)
def test_joined_tiles_are_the_authors(merge, rounding):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 1500, (60, 2), generator=generator).tolist()
    for width, height in [*sizes, (88, 55), (333, 3000), (672, 1008)]:
        plan = slicing.llava_next(width, height, rounding=rounding, merge=merge, patch=56)
        features, newline = _drawn(plan, 6)
        ours = merge_anyres(features, plan, newline if plan.separators else None, rounding=rounding)
        kind = merge.removesuffix("_nobase")
        most = int(kind[-1]) if kind.startswith("anyres") else 0
        theirs = joined(
            features, (width, height), plan.grid, newline, kind="unpad" if most else kind,
            base="nobase" not in merge, most=most, hf=rounding == "hf",
        )  # fmt: skip
        assert ours.shape == (plan.tokens, 3) and torch.equal(ours, theirs), (width, height)
        weight = torch.randn_like(ours)
        wanted = torch.autograd.grad((theirs * weight).sum(), (features, newline), allow_unused=True)
        found = torch.autograd.grad((ours * weight).sum(), (features, newline), allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "height", "tokens", "rows"),
    [(672, 1008, 2160, (48, 32)), (1000, 300, 2182, (22, 72)), (333, 3000, 1224, (72, 8)), (336, 336, 1176, (24, 24))],
)  # fmt: skip
def test_the_worked_examples(width, height, tokens, rows):
    plan = slicing.llava_next(width, height)
    features = torch.arange(plan.views * 576.0).view(-1, 576, 1)
    out = merge_anyres(features, plan, torch.tensor([-1.0]))
    assert out.shape == (tokens, 1) and torch.equal(out[:576, 0], torch.arange(576.0))
    laid = out[576:].view(rows[0], rows[1] + 1)
    assert bool((laid[:, -1] == -1).all()) and bool((laid[:, :-1] >= 576).all())


def test_both_roundings_differ_where_they_must():
    kept = [
        slicing.llava_next(88, 55, rounding=r).features for r in ("llava", "hf")
    ]  # 14 rows by the authors, 16 by Hugging Face
    assert kept[0] != kept[1]
    for rounding, rows in zip(("llava", "hf"), kept, strict=True):
        plan = slicing.llava_next(88, 55, rounding=rounding)
        out = merge_anyres(torch.zeros(plan.views, 576, 1), plan, torch.ones(1), rounding=rounding)
        assert float(out.sum()) == rows[0]


def test_one_view_has_a_newline_behind_it():
    features, newline = torch.randn(1, 4, 3), torch.randn(3)
    assert torch.equal(merge_anyres(features, None, newline), torch.cat([features[0], newline[None]]))
    assert torch.equal(merge_anyres(features, None), features[0])


@pytest.fixture(scope="module")
def model() -> models.Llava:
    torch.manual_seed(0)
    points = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    return models.build(small(aspect="anyres", pinpoints=points)).eval()


def plan(model: models.Llava, width: int, height: int) -> slicing.Plan:
    c = model.config
    side, patch = c.vision.image_size, c.vision.patch_size
    return slicing.llava_next(
        width, height, c.pinpoints, side, rounding=c.rounding, merge=c.merge, patch=patch
    )  # type: ignore[return-value]


@torch.no_grad()
def test_a_batch_of_sizes(model):
    """Each row gives what it gives alone, whether views are packed or padded."""
    plans = [plan(model, *size) for size in ((56, 56), (80, 20), (28, 28))]
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(p.views, 3, 28, 28, generator=generator) for p in plans]
    ids = torch.tensor([[2, 7, 8], [9, 2, 2], [5, 6, 0]])
    rows, mask = model.expand(ids, ids != 0, plans=plans)
    assert (rows == 2).sum(1).tolist() == [plans[0].tokens, plans[1].tokens + plans[2].tokens, 0]
    logits = model(torch.cat(views), rows, mask, plans=plans).logits
    padded = torch.full((3, max(p.views for p in plans), 3, 28, 28), float("nan"))
    for n, view in enumerate(views):
        padded[n, : len(view)] = view
    assert torch.equal(model(padded, rows, mask, plans=plans).logits, logits)
    for n, (own, shown) in enumerate(((views[:1], plans[:1]), (views[1:], plans[1:]))):
        alone = model(torch.cat(own), rows[n : n + 1][mask[n : n + 1]][None], plans=shown).logits
        torch.testing.assert_close(logits[n][mask[n]], alone[0], rtol=1e-4, atol=1e-4)
    out = model.generate(torch.cat(views), rows, mask, plans=plans, max_new_tokens=3, stop=())
    last = model.generate(None, ids[2:, :2], max_new_tokens=3, stop=())
    assert torch.equal(out[2:], last)


@torch.no_grad()
@pytest.mark.parametrize("keep_class", [False, True])
def test_packed_patches_are_the_same_views(model, keep_class):
    """As the front end gives them: rows of patches, channels outermost, view after view."""
    model.config = replace(model.config, vision=replace(model.config.vision, keep_class=keep_class))
    model.vision.config = model.config.vision
    views = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    patches = views.view(5, 3, 2, 14, 2, 14).permute(0, 2, 4, 1, 3, 5).reshape(20, 588)
    torch.testing.assert_close(model.features(patches), model.features(views), rtol=1e-5, atol=1e-5)
    if not keep_class:
        plans = [plan(model, 56, 56)]
        torch.testing.assert_close(
            model.encode(patches, plans), model.encode(views, plans), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="patches: got 18 rows, expected whole views of 4"):
        model.features(patches[:18])
    model.config = replace(model.config, vision=replace(model.config.vision, keep_class=False))
    model.vision.config = model.config.vision


def test_newlines_learn_with_the_text(model):
    model.train()
    for stage in models.config("llava-next-7b").stages:
        pattern = replace(stage, trainable=tuple(p for p in stage.trainable if not p.startswith("vision.")))
        pattern.freeze(model)
        p = plan(model, 56, 40)
        rows, mask = model.expand(torch.tensor([[2, 7, 8]]), plans=[p])
        model(
            torch.randn(p.views, 3, 28, 28), rows, mask, rows.masked_fill(rows == 2, -100), plans=[p]
        ).loss.backward()
        learns = stage.name == "instruct"
        assert (model.image_newline.grad is not None and bool(model.image_newline.grad.any())) == learns
        model.zero_grad()
    model.eval()


def test_what_does_not_fit_is_refused_by_name(model):
    p = plan(model, 56, 56)
    features = torch.zeros(p.views, 4, 3)
    for match, call in (
        ("features: got 4 views, expected the plan's 5", lambda: merge_anyres(features[1:], p, torch.zeros(3))),
        ("newline: got None", lambda: merge_anyres(features, p)),
        ("features: got 3 tokens a view", lambda: merge_anyres(features[:, :3], p, torch.zeros(3))),
        ("features: got 5 views without a plan", lambda: merge_anyres(features, None)),
        ("rounding: got 'up'", lambda: merge_anyres(features, p, torch.zeros(3), rounding="up")),
        ("images: got 4 views, expected 5", lambda: model.encode(torch.zeros(4, 3, 28, 28), [p])),
        ("images: got 1 pictures of 4 views", lambda: model.encode(torch.zeros(1, 4, 3, 28, 28), [p])),
        ("plans: got 1 for aspect 'pad'", lambda: models.build(small()).encode(torch.zeros(5, 3, 28, 28), [p])),
        ("counts: got 1 for 2 images", lambda: model.expand(torch.tensor([[2, 2]]), plans=[p])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
