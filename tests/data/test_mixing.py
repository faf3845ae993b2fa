"""Sets are mixed by the square roots of their sizes, or as told, and draws are numbered."""

from __future__ import annotations

import pytest

from mmkernels.data.mixing import Mixture, capped, explicit, square_root


def test_square_roots():
    assert square_root({"a": 100, "b": 400, "c": 900}) == pytest.approx({"a": 1 / 6, "b": 2 / 6, "c": 3 / 6})


def test_a_large_set_counts_as_no_more_than_the_cap():
    assert capped({"a": 1e6, "b": 50_000, "c": 25_000}) == {"a": 0.4, "b": 0.4, "c": 0.2}
    assert capped({"a": 3, "b": 1}, 2) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    with pytest.raises(ValueError, match="most: got 0, expected a number above 0"):
        capped({"a": 3}, 0)
    with pytest.raises(ValueError, match="sizes: got "):
        capped({})


def test_explicit_ratios_are_made_to_sum_to_one():
    assert explicit({"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}


def test_draws_follow_the_odds_and_are_numbered():
    mixture = Mixture(square_root({"a": 100, "b": 400, "c": 900, "none": 0}), seed=1)
    drawn = [mixture.draw(n) for n in range(3000)]
    assert [mixture.draw(n) for n in (5, 2999)] == [drawn[5], drawn[2999]]
    counts = {name: drawn.count(name) for name in ("a", "b", "c", "none")}
    assert counts == pytest.approx({"a": 500, "b": 1000, "c": 1500, "none": 0}, abs=90)
    assert drawn != [Mixture(mixture.odds, seed=2).draw(n) for n in range(3000)]


@pytest.mark.parametrize("values", [{}, {"a": 0}, {"a": -1.0, "b": 2}, {"a": float("nan")}])
def test_impossible_odds_are_refused(values):
    with pytest.raises(ValueError, match=r"sizes: got .*expected numbers of 0 or more"):
        square_root(values)
    with pytest.raises(ValueError, match="ratios: got "):
        explicit(values)
