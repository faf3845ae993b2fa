"""Slicing plans against the published rules, re-derived one picture at a time in `published_slicing`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels.data import slicing
from tests.data import published_slicing as published

SIDE = st.one_of(
    st.integers(1, 10_000),
    st.integers(1, 40),
    st.sampled_from([335, 336, 337, 672, 1008, 1080, 1081, 1920, 1921, 9999, 10_000]),
)
SIZES = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=8)
LONG = [*published.PINPOINTS, (336, 1344), (1344, 336)]
EDGES = [
    (1, 1),
    (1, 10_000),
    (10_000, 1),
    (10_000, 10_000),
    (336, 336),
    (337, 335),
    (700, 840),
    (1, 4000),
    (4000, 1),
]


def agree(plan, expected):
    for name, value in expected.items():
        got = plan.layout.tolist() if name == "layout" else getattr(plan, name)
        assert got == value, (plan.size, name)
    assert len(plan.layout) == plan.tokens


def check(rule, published_rule, pairs):
    w, h = (np.array(side) for side in zip(*pairs, strict=True))
    plans = rule(w, h)
    for at, (width, height) in enumerate(pairs):
        agree(plans[at], published_rule(width, height))
    agree(rule(*pairs[0]), published_rule(*pairs[0]))


RULES = {
    "llava_next": (slicing.llava_next, published.llava_next),
    "llava_next_long_list": (
        lambda w, h: slicing.llava_next(w, h, LONG),
        lambda w, h: published.llava_next(w, h, LONG),
    ),
    "llava_next_hf": (
        lambda w, h: slicing.llava_next(w, h, rounding="hf"),
        lambda w, h: published.llava_next(w, h, rounding="hf"),
    ),
    "uhd_original": (slicing.llava_uhd, published.uhd_original),
    "uhd_eccv": (lambda w, h: slicing.llava_uhd(w, h, release="eccv"), published.uhd_eccv),
    "slime": (slicing.slime, published.slime),
}


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs=SIZES)
def test_plans_are_the_published_rules(name, pairs):
    check(*RULES[name], pairs)


@pytest.mark.parametrize("name", RULES)
def test_plans_of_edges_and_ties(name):
    check(
        *RULES[name], EDGES + [(k * a, k * b) for k in (1, 56, 336) for a in range(1, 8) for b in range(1, 8)]
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs=SIZES)
def test_fuyu_plans_are_the_published_rule(pairs):
    kept = [pair for pair in pairs if published.fuyu(*pair)]
    for pair in set(pairs) - set(kept):
        with pytest.raises(ValueError, match="leaves a pixel each way"):
            slicing.fuyu(*pair)
    if kept:
        check(slicing.fuyu, published.fuyu, kept)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(w=SIDE, h=SIDE)
def test_monkey_ignores_the_size(w, h):
    plan = slicing.monkey(w, h)
    assert plan.resized == (896, 896)
    assert plan.boxes == [(0, 0, 448, 448), (448, 0, 896, 448), (0, 448, 448, 896), (448, 448, 896, 896)]
    assert plan.layout.tolist() == list(range(1280))
    wide = slicing.monkey(w, h, canvas=(1344, 896))
    assert (wide.grid, wide.tokens, wide.views) == ((3, 2), 1792, 7)
    assert slicing.monkey(w, h, canvas=(1400, 900)).boxes == wide.boxes  # the remainder is dropped


@pytest.mark.parametrize(
    ("size", "grid", "resized", "offset", "features", "tokens"),
    [
        ((672, 1008), (2, 2), (448, 672), (112, 0), (48, 32), 2160),
        ((1000, 300), (3, 1), (1008, 303), (0, 16), (22, 72), 2182),
        ((333, 3000), (1, 3), (112, 1008), (112, 0), (72, 8), 1224),
        ((336, 336), (1, 2), (336, 336), (0, 168), (24, 24), 1176),
    ],
)
def test_llava_next_worked_examples(size, grid, resized, offset, features, tokens):
    plan = slicing.llava_next(*size, published.PINPOINTS, 336)
    assert (plan.grid, plan.resized, plan.offset) == (grid, resized, offset)
    assert (plan.features, plan.tokens) == (features, tokens)
    assert plan.boxes[-1] == (336 * (grid[0] - 1), 336 * (grid[1] - 1), 336 * grid[0], 336 * grid[1])


def test_a_longer_list_of_pinpoints_and_a_full_one():
    plan = slicing.llava_next(333, 3000, LONG, 336)
    assert (plan.grid, plan.resized, plan.features, plan.tokens) == ((1, 4), (150, 1344), (96, 10), 1632)
    assert slicing.llava_next(2000, 2000).tokens == 576 + 48 * 49 == 2928
    assert slicing.llava_next(336, 1344, LONG).tokens == 2976
    assert slicing.llava_next(336, 336, LONG[1:] + LONG[:1]).grid == (2, 1)  # the first of equals wins


def test_the_two_roundings_differ_where_they_should():
    assert slicing.llava_next(88, 55, [(336, 672)]).features[0] == 14
    assert slicing.llava_next(88, 55, [(336, 672)], rounding="hf").features[0] == 16


@pytest.mark.parametrize(
    ("release", "size", "grid", "slices", "overview", "tokens"),
    [
        ("original", (672, 1008), (2, 3), (336, 336), (266, 406), 454),
        ("original", (1000, 300), (3, 1), (350, 308), (602, 182), 259),
        ("original", (333, 3000), (1, 7), (294, 378), (98, 1008), 519),
        ("eccv", (672, 1008), (2, 3), (336, 336), (266, 406), 1014),
        ("eccv", (1000, 300), (3, 1), (350, 308), (602, 182), 579),
        ("eccv", (333, 3000), (1, 7), (294, 378), (98, 1008), 1159),
    ],
)
def test_llava_uhd_worked_examples(release, size, grid, slices, overview, tokens):
    plan = slicing.llava_uhd(*size, release=release)
    assert (plan.grid, plan.slice_size, plan.overview_size, plan.tokens) == (grid, slices, overview, tokens)
    assert (plan.layout == -1).sum() == grid[1] * (grid[0] - 1)
    assert (plan.layout == -2).sum() == grid[1]


def test_llava_uhd_cuts_the_picture_itself_or_the_resized_one():
    assert [b[0] for b in slicing.llava_uhd(1000, 300).boxes] == [0, 333, 666]
    eccv = slicing.llava_uhd(1000, 300, release="eccv")
    assert eccv.resized == (1050, 308)
    assert eccv.boxes[1] == (350, 0, 700, 308)


@pytest.mark.parametrize(
    ("size", "grid", "tokens"), [((672, 1008), (23, 34), 816), ((1000, 300), (34, 10), 350)]
)
def test_fuyu_worked_examples(size, grid, tokens):
    plan = slicing.fuyu(*size)
    assert (plan.grid, plan.tokens, plan.views) == (grid, tokens, grid[0] * grid[1])
    small = slicing.fuyu(333, 3000)
    assert (small.resized, small.grid, small.tokens) == ((119, 1080), (4, 36), 180)


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((672, 1008), (2, 3), 1441),
        ((1000, 300), (3, 1), 1009),
        ((333, 3000), (1, 7), 1585),
        ((640, 480), (2, 2), 1153),
    ],
)
def test_slime_worked_examples(size, grid, tokens):
    plan = slicing.slime(*size)
    assert (plan.grid, plan.tokens) == (grid, tokens)
    assert slicing.slime(336, 336).tokens == 865


def test_merges():
    plain = slicing.llava_next(672, 1008, merge="spatial")
    assert plain.layout[576:].tolist()[:48] == [*range(576, 600), *range(1152, 1176)]
    flat = slicing.llava_next(672, 1008, merge="flat")
    assert flat.layout.tolist() == list(range(576 * 5))
    pooled = slicing.llava_next(672, 1008, merge="spatial_maxpool2x2")
    assert (pooled.features, pooled.tokens) == ((24, 24), 1152)
    bare = slicing.llava_next(672, 1008, merge="spatial_unpad_nobase")
    assert (bare.tokens, bare.overview_size, bare.views) == (48 * 33, None, 4)
    assert (
        (bare.layout[:2] + 576).tolist()
        == slicing.llava_next(672, 1008).layout[576:578].tolist()
        == [584, 585]
    )
    capped = slicing.llava_next(672, 1008, merge="anyres_max_1")
    t = math.sqrt(48 * 32 / 576)
    assert capped.features == (int(48 // t), int(32 // t))
    assert capped.tokens == 576 + capped.features[0] * (capped.features[1] + 1)
    same = slicing.llava_next(672, 1008, merge="anyres_max_9")
    assert same.layout.tolist() == slicing.llava_next(672, 1008).layout.tolist()


def test_ids_and_text():
    fuyu = slicing.fuyu(61, 31)
    assert fuyu.ids(71011, 71019).tolist() == [71011, 71011, 71011, 71019] * 2
    assert fuyu.text("x", "|") == "xxx|xxx|"
    uhd = slicing.llava_uhd(672, 336, tokens_per_view=1)
    assert uhd.ids(-200, 13, 29892).tolist() == [-200, 29892, -200, 13, -200]
    assert uhd.text("i") == "i,i\ni"
    with pytest.raises(ValueError, match="comma: got None"):
        uhd.ids(-200, 13)
    slime = slicing.slime(336, 336).ids(-200, comma=1919)
    assert (slime == 1919).nonzero()[0].tolist() == [576]


def test_a_batch_of_none():
    none = np.zeros(0, dtype=np.int64)
    for rule in (slicing.llava_next, slicing.llava_uhd, slicing.monkey, slicing.fuyu, slicing.slime):
        assert list(rule(none, none)) == []


def test_very_thin_pictures_and_gigapixels():
    assert slicing.llava_next(1, 100_000).features == (48, 0)  # newlines alone, as published
    for release in ("original", "eccv"):
        plan = slicing.llava_uhd(1, 100_000, release=release)
        assert min(plan.overview_size or plan.slice_size) >= 14
    assert slicing.slime(100_000, 100_000).views <= 8


@pytest.mark.parametrize(
    "rule", [slicing.llava_next, slicing.llava_uhd, slicing.monkey, slicing.fuyu, slicing.slime]
)
def test_bad_sizes(rule):
    with pytest.raises(ValueError, match=r"width, height: got 0 x 5, expected at least one pixel"):
        rule(0, 5)
    with pytest.raises(ValueError, match=r"width, height: got 7 x -1"):
        rule(np.array([5, 7]), np.array([5, -1]))
    with pytest.raises(TypeError, match="width: got float64, expected integers"):
        rule(1.5, 2)
    with pytest.raises(ValueError, match="height: got 1 of them, expected 2"):
        rule(np.array([5, 7]), np.array([5]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: slicing.llava_next(5, 5, []), "pinpoints"),
        (lambda: slicing.llava_next(5, 5, [(300, 336)]), "pinpoints"),
        (lambda: slicing.llava_next(5, 5, rounding="up"), "rounding: got 'up'"),
        (lambda: slicing.llava_next(5, 5, merge="spatial_unpat"), "merge: got 'spatial_unpat'"),
        (lambda: slicing.llava_next(5, 5, merge="anyres_max_0"), "merge: got"),
        (lambda: slicing.llava_uhd(5, 5, release="iccv"), "release: got 'iccv'"),
        (lambda: slicing.llava_uhd(5, 5, 0), "max_slices: got 0"),
        (lambda: slicing.monkey(5, 5, canvas=400), "canvas, window"),
        (lambda: slicing.monkey(5, 5, canvas=(896, 0)), "canvas: got"),
        (lambda: slicing.slime(5, 5, tokens_per_view=143), "tokens_per_view: got 143"),
        (lambda: slicing.check_slices(slicing.llava_next(2000, 2000), 3), "4 slices, expected at most 3"),
        (lambda: slicing.check_context(2928, 2048), "880 more than the 2048"),
        (lambda: slicing.check_context(2000, 2048, 60), "2000 visual and 60 text tokens are 12 more"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_what_fits_passes():
    slicing.check_context(2000, 2048, 48)
    slicing.check_slices(slicing.llava_next(np.array([2000]), np.array([2000])), 4)
