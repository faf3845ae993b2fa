"""NExT-GPT's projectors against their published computation: outputs, gradients, weights of both releases, bad input."""

from __future__ import annotations

import published_next_gpt as published
import pytest
import torch

from mmkernels import layers, weights
from mmkernels.layers.grouping_projector import draw_gumbel

DEPTHS, TOKENS, GROUPS = (2, 1, 1), (6, 3, 0), (6, 3)


def renamed(state, current):
    """The same parameters with the second release's names."""
    if not current:
        return dict(state)
    swap = {"fc.": "in_fc.", "model.": "out_fc."}
    return {
        next((b + k[len(a) :] for a, b in swap.items() if k.startswith(a)), k): v for k, v in state.items()
    }


@pytest.mark.parametrize("current", [False, True], ids=["first_release", "second_release"])
@pytest.mark.parametrize(("signals", "queries", "out"), [(4, 7, 12), (7, 1, 6)])
def test_the_output_projection_is_torchs_transformer(current, signals, queries, out):
    torch.manual_seed(0)
    theirs = published.TextFc(20, out, queries, hidden=32).double()
    ours = layers.OutputProjection(20, out, queries, hidden=32).double()
    weights.load(ours, renamed(theirs.state_dict(), current), source="next_gpt")
    h, e, probe = torch.randn(3, signals, 20), torch.randn(3, signals, 20), torch.randn(3, queries, out)
    grads = []
    for module in (ours, theirs):
        x, y = (t.double().requires_grad_() for t in (h, e))
        value = module(x, y)
        grads.append((value, *torch.autograd.grad((value * probe).sum(), [x, y, *module.parameters()])))
    for a, b in zip(grads[0][:3], grads[1][:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    norms = [torch.stack([g.norm() for g in found[3:]]).square().sum() for found in grads]
    torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-9)


def test_a_file_with_a_missing_or_a_foreign_key_loads_nothing():
    theirs = published.TextFc(20, 6, 2, hidden=32).state_dict()
    ours = layers.OutputProjection(20, 6, 2, hidden=32)
    before = ours.queries.clone()
    missing = {k: v for k, v in theirs.items() if k != "tfm.decoder.layers.2.multihead_attn.in_proj_bias"}
    with pytest.raises(ValueError, match=r"missing: tfm\.decoder\.layers\.2\.multihead_attn\.in_proj_bias"):
        weights.load(ours, missing, source="next_gpt")
    with pytest.raises(ValueError, match=r"left over: tfm\.more"):
        weights.load(ours, theirs | {"tfm.more": torch.ones(1)}, source="next_gpt")
    assert torch.equal(ours.queries, before)


def test_fresh_queries():
    assert layers.OutputProjection(8, 4, 50, hidden=16).queries.std() > 0.5
    zero = layers.OutputProjection(8, 4, 5, hidden=16, init="zero")
    rows = zero(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))  # until training parts them


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("inputs", [1, 5])
def test_the_grouping_projector_is_groupvit(train, inputs):
    state = published.state(10, 14, 24, DEPTHS, TOKENS, GROUPS)
    ours = layers.GroupingProjector(10, 14, hidden=24, heads=4, depths=DEPTHS, tokens=TOKENS, groups=GROUPS)
    ours = ours.double().train(train)
    weights.load(ours, state, source="next_gpt")
    media = torch.randn(3, inputs, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shapes = [(3, 6, inputs), (3, 3, 6)]
    noise = [torch.distributions.Gumbel(0.0, 1.0).sample(s).double() for s in shapes] if train else None
    probe, found = torch.randn(3, 3, 14, dtype=torch.float64), []
    for forward in (
        lambda x: ours(x, noise),
        lambda x: published.project(state, x, DEPTHS, 4, [*(noise or [None, None]), None]),
    ):
        x = media.clone().requires_grad_()
        value = forward(x)
        found.append((value, torch.autograd.grad((value * probe).sum(), x)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert found[0][0].shape == (3, 3, 14) and found[0][1].abs().sum() > 0


def test_training_draws_the_noise_that_the_published_code_draws():
    like = torch.empty(0)
    torch.manual_seed(4)
    ours = draw_gumbel((2, 3), like)
    torch.manual_seed(4)
    theirs = torch.distributions.Gumbel(torch.tensor(0.0), torch.tensor(1.0)).sample((2, 3))
    torch.testing.assert_close(ours, theirs)
    projector = layers.GroupingProjector(
        10, 14, hidden=24, heads=4, depths=DEPTHS, tokens=TOKENS, groups=GROUPS
    )
    x = torch.randn(2, 4, 10)
    assert not torch.equal(projector(x), projector(x))
    projector.eval()
    assert torch.equal(projector(x), projector(x))


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        image, audio = layers.OutputProjection(4096, 768, 77), layers.OutputProjection(4096, 512, 1)
        group = layers.GroupingProjector(1024, 4096)
        theirs = published.TextFc(4096, 768, 77)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(image) == count(theirs) == 31_958_784 and round(count(audio) / 1e6, 1) == 31.8
    shapes = published.state(1024, 4096, 512, (6, 3, 3), (64, 8, 0), (64, 8))
    assert count(group) == sum(v.numel() for v in shapes.values()) and group.places == 8


def test_alignment_is_a_norm_and_not_its_square():
    pred, target = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2)
    assert layers.alignment_loss(pred, target) == 2.5
    assert layers.alignment_loss(pred, target, "sum") == 5 and layers.alignment_loss(
        pred, target, reduction="none"
    ).tolist() == [[5, 0]]
    x = pred.clone().requires_grad_()
    layers.alignment_loss(x, target).backward()
    assert torch.equal(x.grad, torch.tensor([[[0.3, 0.4], [0.0, 0.0]]]))  # equal tokens: no NaN
    assert layers.alignment_loss(torch.zeros(0, 2, 2), torch.zeros(0, 2, 2)) == 0
    half = layers.alignment_loss(pred.bfloat16(), target.bfloat16())
    assert half.dtype == torch.float32


def test_bad_input_is_named():
    projection = layers.OutputProjection(8, 4, 5, hidden=16)
    for call, match in (
        (lambda: projection(torch.ones(1, 2, 7), torch.ones(1, 2, 7)), "x: got shape"),
        (lambda: projection(torch.ones(1, 2, 8), torch.ones(1, 3, 8)), "embeddings: got shape"),
        (lambda: projection(torch.ones(1, 0, 8), torch.ones(1, 0, 8)), "signals: got 0"),
        (lambda: layers.OutputProjection(8, 4, 0), "queries: got 0"),
        (lambda: layers.OutputProjection(8, 4, 1, init="ones"), "init: got 'ones'"),
        (lambda: layers.alignment_loss(torch.ones(2, 3), torch.ones(3)), "target: got shape"),
        (lambda: layers.alignment_loss(torch.ones(3), torch.ones(3), "max"), "reduction: got 'max'"),
        (lambda: layers.GroupingProjector(8, 4, tokens=(6, 3)), "tokens, groups: got"),
        (lambda: layers.GroupingProjector(8, 4, hidden=16, heads=2)(torch.ones(1, 0, 8)), "tokens: got 0"),
        (lambda: layers.GroupingProjector(8, 4, hidden=16, heads=2)(torch.ones(1, 2, 8), []), "noise: got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"pred: got torch\.int64"):
        layers.alignment_loss(torch.ones(3, dtype=torch.long), torch.ones(3))
