"""The permutation test holds its level for any text, and the classifier finds what is new."""

from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitoring.drift.two_sample import mmd
from monitoring.drift.two_sample.mmd import Similarity, permutation_test, separation, typical
from scipy.stats import binom, hypergeom

from svc.drift_reference.sample import Floats

WIDTHS = (1.0, 0.55)
SURE = 0.9999
"""Of what chance allows; seeds are fixed, so a test that holds once holds always."""


def draw(seed: int, *shape: int, at: float = 0.0) -> Floats:
    return np.random.default_rng(seed).normal(at, 1.0, shape)


def similarities(reference: Floats, live: Floats) -> Floats:
    both = [np.concatenate([reference, live])]
    return Similarity([reference], [1.0])(both, both)


def moved(reference: int = 40, live: int = 10, by: float = 6.0) -> Floats:
    """Of two groups that lie far apart."""
    return similarities(draw(1, reference, 3), draw(2, live, 3, at=by))


def exact_p(matrix: Floats, live: int) -> float:
    """The share of all subsets that look as different as the live ones, the live ones among them."""
    total = len(matrix)
    centred = matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()
    sums = [centred[np.ix_(chosen, chosen)].sum() for chosen in map(list, combinations(range(total), live))]
    return float(np.mean([value >= sums[-1] - 1e-9 for value in sums]))


def mean_p(matrix: Floats, live: int, repeats: int = 40) -> float:
    return float(np.mean([permutation_test(matrix, live, 1e-3, (seed,)) for seed in range(repeats)]))


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_the_p_value_is_that_of_all_subsets(seed: int, shift: float) -> None:
    points = draw(seed, 9, 2)
    points[-3:] += shift
    matrix = similarities(points[:6], points[6:])
    exact = exact_p(matrix, 3)
    # A mean of 40 times at least 128 shuffles; the test adds what was seen to them.
    expected = (128 * exact + 1) / 129
    assert abs(mean_p(matrix, 3) - expected) < 6 * np.sqrt(exact * (1 - exact) / 40 / 128) + 0.005


@pytest.mark.parametrize("first", [24, 26, 30])
def test_shuffles_that_look_just_as_different_count(first: int) -> None:
    # Two prompts come again and again, so that a shuffle is told by how often it takes the first.
    reference, live = 200, 50
    is_first = np.array([place % 2 == 0 for place in range(reference)] + [place < first for place in range(live)])
    matrix = np.where(is_first[:, None] == is_first[None], 1.0, 0.3)
    expected, counts = live * is_first.mean(), np.arange(live + 1)
    as_different = np.abs(counts - expected) >= abs(first - expected) - 1e-9
    exact = float(hypergeom(len(matrix), is_first.sum(), live).pmf(counts)[as_different].sum())
    assert mean_p(matrix, live, 60) == pytest.approx(exact, abs=0.03)


def normal(generator: np.random.Generator, size: int) -> Floats:
    return generator.normal(size=(size, 2))


def heavy(generator: np.random.Generator, size: int) -> Floats:
    return generator.standard_cauchy((size, 2))


def few_distinct(generator: np.random.Generator, size: int) -> Floats:
    points: Floats = np.eye(3)[generator.choice(3, size, p=[0.5, 0.3, 0.2])]
    return points


def two_scales(generator: np.random.Generator, size: int) -> Floats:
    spread = np.where(generator.random(size) < 0.6, 0.01, 1.0)
    points: Floats = generator.normal(size=(size, 2)) * spread[:, None]
    return points


@pytest.mark.parametrize("draw_alike", [normal, heavy, few_distinct, two_scales])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_prompts_that_are_drawn_alike_are_told_apart_as_rarely_as_the_level_says(
    draw_alike: Callable[[np.random.Generator, int], Floats], level: float
) -> None:
    generator, repeats = np.random.default_rng(1), 400
    called = 0
    for seed in range(repeats):
        points = draw_alike(generator, 30)
        called += permutation_test(similarities(points[:20], points[20:]), 10, level, (seed,)) <= level
    assert called <= binom.ppf(SURE, repeats, level)


def test_prompts_that_lie_apart_are_told_apart_at_any_level() -> None:
    assert permutation_test(moved(), 10, 1e-5, (1,)) <= 1e-5


def test_one_distinct_prompt_on_both_sides_is_no_difference() -> None:
    assert permutation_test(np.ones((50, 50)), 10, 1e-5, (1,)) > 0.5


def test_the_same_seed_gives_the_same_value() -> None:
    matrix = similarities(draw(1, 40, 3), draw(2, 10, 3, at=0.6))
    assert permutation_test(matrix, 10, 1e-3, (4, 2)) == permutation_test(matrix, 10, 1e-3, (4, 2))


def test_another_seed_shuffles_otherwise() -> None:
    matrix = similarities(draw(1, 40, 3), draw(2, 10, 3))
    assert len({permutation_test(matrix, 10, 1e-3, (seed,)) for seed in range(10)}) > 1


def test_where_alpha_is_out_of_reach_it_stops_early() -> None:
    shuffles = mmd._FIRST_SHUFFLES
    counted = permutation_test(similarities(draw(1, 40, 3), draw(2, 10, 3)), 10, 1e-7, (1,)) * (shuffles + 1)
    assert counted == pytest.approx(round(counted), abs=1e-9)


def test_a_forecast_can_only_keep_from_calling_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmd, "_forecast", lambda *_: 1.0)
    alpha = 6e-4
    assert permutation_test(moved(), 10, alpha, (1,)) > alpha


@pytest.mark.parametrize(("total", "size"), [(100, 4), (12, 4), (210, 10), (50, 50)])
def test_members_of_a_subset_are_distinct(total: int, size: int) -> None:
    subsets = mmd._subsets(np.random.default_rng(1), 500, total, size)
    assert subsets.shape == (500, size)
    assert all(len(set(row)) == size for row in subsets.tolist())
    assert subsets.min() >= 0 and subsets.max() < total


@pytest.mark.parametrize(("total", "size"), [(100, 4), (12, 4)])
def test_each_is_a_member_equally_often(total: int, size: int) -> None:
    rows = 6000
    counts = np.bincount(mmd._subsets(np.random.default_rng(1), rows, total, size).ravel(), None, total)
    low, high = binom.ppf([(1 - SURE) / total, 1 - (1 - SURE) / total], rows, size / total)
    assert low <= counts.min() and counts.max() <= high


@pytest.mark.parametrize(("total", "size", "subsets"), [(4, 2, 6), (6, 2, 15), (5, 3, 10)])
def test_each_subset_is_as_likely_as_any_other(total: int, size: int, subsets: int) -> None:
    rows = 6000
    found = mmd._subsets(np.random.default_rng(1), rows, total, size)
    counts = Counter(frozenset(row) for row in found.tolist())
    low, high = binom.ppf([(1 - SURE) / subsets, 1 - (1 - SURE) / subsets], rows, 1 / subsets)
    assert len(counts) == subsets
    assert low <= min(counts.values()) and max(counts.values()) <= high


@pytest.mark.parametrize("size", [3, 16, 17, 40])
def test_sums_are_those_of_the_chosen_rows_and_columns(size: int) -> None:
    matrix = draw(1, 60, 60).astype(np.float32)
    subsets = mmd._subsets(np.random.default_rng(1), 20, 60, size)
    expected = [matrix[np.ix_(row, row)].sum(dtype=np.float64) for row in subsets]
    assert mmd._sums(matrix, subsets) == pytest.approx(expected, abs=1e-3)


def test_a_prompt_is_wholly_like_itself() -> None:
    views = [draw(1, 20, 5), draw(2, 20, 3)]
    assert np.diag(Similarity(views, WIDTHS)(views, views)) == pytest.approx(1)


def test_similarity_is_the_same_from_either_side() -> None:
    ones, others = [draw(1, 20, 5), draw(2, 20, 3)], [draw(3, 8, 5), draw(4, 8, 3)]
    similarity = Similarity(ones, WIDTHS)
    assert similarity(ones, others) == pytest.approx(similarity(others, ones).T)


def test_similarity_lies_between_0_and_1() -> None:
    views = [draw(1, 20, 5), draw(2, 20, 3)]
    far = [draw(3, 8, 5, at=1e6), draw(4, 8, 3, at=-1e6)]
    found = Similarity(views, WIDTHS)(views, far)
    assert found.min() >= 0 and found.max() <= 1


def test_prompts_at_the_typical_distance_have_one_similarity_whatever_the_scale() -> None:
    views = [draw(1, 20, 5)]
    wide = [1000 * views[0]]
    assert Similarity(views, [1.0])(views, views) == pytest.approx(Similarity(wide, [1.0])(wide, wide))


def test_half_the_width_is_twice_the_distance() -> None:
    views, halved = [draw(1, 20, 5)], [draw(1, 20, 5) / 2]
    narrow, wide = Similarity(views, [0.5]), Similarity(views, [1.0])
    assert narrow(halved, halved) == pytest.approx(wide(views, views))


@pytest.mark.parametrize("flat", [np.zeros((20, 3)), np.full((20, 3), 0.1), np.zeros((20, 0))])
def test_a_view_without_spread_is_left_out(flat: Floats) -> None:
    view = draw(1, 20, 5)
    alone, both = Similarity([view], [1.0]), Similarity([view, flat], WIDTHS)
    assert both([view, flat], [view, flat]) == pytest.approx(alone([view], [view]))


def test_where_no_view_has_spread_all_are_alike() -> None:
    reference, live = [np.zeros((20, 3)), np.zeros((20, 0))], [draw(1, 4, 3), np.zeros((4, 0))]
    assert (Similarity(reference, WIDTHS)(live, reference) == np.ones((4, 20))).all()


@pytest.mark.parametrize("size", [1, 2])
def test_a_reference_of_one_or_two_prompts_is_no_trouble(size: int) -> None:
    views = [draw(1, size, 3)]
    assert np.isfinite(Similarity(views, [1.0])(views, views)).all()


def test_what_lies_apart_is_separated() -> None:
    assert separation(moved(), 10) == pytest.approx(1)


def test_what_is_drawn_alike_is_hardly_separated() -> None:
    assert separation(similarities(draw(1, 200, 3), draw(2, 100, 3)), 100) < 0.6


def test_what_is_the_same_is_not_separated() -> None:
    assert separation(np.ones((50, 50)), 10) == 0.5


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8))
def test_separation_lies_between_a_half_and_1(seed: int, reference: int, live: int) -> None:
    matrix = draw(seed, reference + live, reference + live)
    assert 0.5 <= separation(matrix + matrix.T, live) <= 1


def test_the_new_ones_are_typical() -> None:
    live = draw(2, 12, 3)
    live[[3, 7, 8]] += 6
    assert set(typical(similarities(draw(1, 40, 3), live), 12, 3)) == {3, 7, 8}


def test_no_more_are_typical_than_there_are() -> None:
    assert sorted(typical(moved(live=4), 4, 9)) == [0, 1, 2, 3]
