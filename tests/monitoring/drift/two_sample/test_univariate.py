"""Exact tests of readable features hold their level, whatever the values are, and see what has moved."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitoring.drift.two_sample.univariate import (
    category_stability,
    compare_categories,
    compare_numbers,
    compare_shares,
    false_discovery_rates,
    fisher,
    number_stability,
)
from numpy.typing import NDArray
from scipy.stats import binom, fisher_exact, ks_2samp

from svc.drift_reference.sample import NO, NOT_THERE, YES, Floats, Names

NAN = float("nan")
REPEATS = 400
SURE = 0.9999
"""Of what chance allows; seeds are fixed, so a test that holds once holds always."""

numbers = st.lists(st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0, NAN]), max_size=12).map(
    lambda values: np.array(values, dtype=np.float64)
)
names = st.lists(st.sampled_from(["en", "de", "fr", NOT_THERE]) | st.text("ab😀", max_size=2), max_size=12).map(
    lambda values: np.array(values, dtype=np.str_)
)


def upto(stop: int) -> Floats:
    return np.arange(stop, dtype=np.float64)


def categories(**counts: int) -> Names:
    return np.array([name for name, count in counts.items() for _ in range(count)], dtype=np.str_)


def normals(seed: int, size: int, at: float = 0.0) -> Floats:
    return np.random.default_rng(seed).normal(at, 1.0, size)


@given(numbers, numbers)
def test_of_any_numbers_the_p_value_lies_between_0_and_1(reference: Floats, live: Floats) -> None:
    assert 0 <= compare_numbers(reference, live) <= 1


@given(names, names)
def test_of_any_categories_the_p_value_lies_between_0_and_1(reference: Names, live: Names) -> None:
    assert 0 <= compare_categories(reference, live) <= 1
    assert 0 <= compare_shares(reference, live, "en") <= 1


@given(numbers, numbers)
def test_of_any_numbers_stability_is_at_least_0(reference: Floats, live: Floats) -> None:
    assert number_stability(reference, live).index >= 0


@given(names, names)
def test_of_any_categories_stability_is_at_least_0(reference: Names, live: Names) -> None:
    assert category_stability(reference, live).index >= 0


@given(numbers)
def test_what_is_the_same_has_not_moved(values: Floats) -> None:
    assert (compare_numbers(values, values), number_stability(values, values).index) == (1.0, 0.0)


@given(names)
def test_the_same_categories_have_not_moved(values: Names) -> None:
    assert (compare_categories(values, values), category_stability(values, values).index) == (1.0, 0.0)


@pytest.mark.parametrize("few", [np.empty(0), np.full(50, NAN), upto(4), np.array([1.0, 2, 3, 4, NAN, NAN])])
def test_numbers_that_are_too_few_are_not_compared(few: Floats) -> None:
    many = upto(100) + 1000
    assert compare_numbers(many, few) == compare_numbers(few, many) == 1.0


@pytest.mark.parametrize(
    "few", [categories(), categories(en=4), np.array([NOT_THERE] * 50), np.array(["en"] * 4 + [""])]
)
def test_categories_that_are_too_few_are_not_compared(few: Names) -> None:
    many = categories(de=100)
    assert compare_categories(many, few) == compare_categories(few, many) == compare_shares(many, few, "en") == 1.0


@pytest.mark.parametrize("nothing", [np.empty(0), np.full(5, NAN)])
def test_where_there_are_no_numbers_stability_is_0(nothing: Floats) -> None:
    assert number_stability(upto(9), nothing).index == number_stability(nothing, upto(9)).index == 0.0


def test_where_there_are_no_categories_stability_is_0() -> None:
    assert category_stability(categories(en=9), np.array([NOT_THERE])).index == 0.0


def test_numbers_that_are_not_there_are_left_out() -> None:
    reference, live = normals(1, 40), normals(2, 20, at=0.8)
    holes = np.full(7, NAN)
    with_holes = np.concatenate([holes, reference, holes]), np.concatenate([live, holes])
    assert compare_numbers(*with_holes) == compare_numbers(reference, live)
    assert number_stability(*with_holes) == number_stability(reference, live)


def test_categories_that_are_not_there_are_left_out() -> None:
    reference, live, holes = categories(en=30, de=10), categories(en=8, de=12), np.array([NOT_THERE] * 7)
    with_holes = np.concatenate([holes, reference]), np.concatenate([live, holes])
    assert compare_categories(*with_holes) == compare_categories(reference, live)
    assert category_stability(*with_holes) == category_stability(reference, live)


@pytest.mark.parametrize("at", [0.0, 0.8, 1.2, 2.0])
def test_small_p_values_of_numbers_are_exact(at: float) -> None:
    reference, live = normals(1, 40), normals(2, 15, at)
    exact = float(ks_2samp(reference, live, method="exact").pvalue)
    assert compare_numbers(reference, live) == pytest.approx(exact, abs=0 if exact < 0.05 else 0.15)


def test_a_moved_number_is_significant_at_the_level_of_an_alarm() -> None:
    assert compare_numbers(upto(200), upto(10) + 1000) < 1e-10


def test_a_new_category_is_significant_at_the_level_of_an_alarm() -> None:
    assert compare_categories(categories(en=200), categories(de=10)) < 1e-10


def test_a_new_category_among_many_is_seen() -> None:
    known = np.array([f"name {place % 20}" for place in range(200)])
    assert compare_categories(known, np.concatenate([known[:30], categories(new=15)])) < 1e-6


def test_a_thousand_categories_that_all_come_once_are_no_shift() -> None:
    every = np.array([f"name {place}" for place in range(1000)])
    assert compare_categories(every[:900], every[900:]) == 1.0


def test_of_two_categories_it_does_not_matter_which_is_tested() -> None:
    one = compare_categories(categories(a=30, b=10), categories(a=5, b=15))
    assert compare_categories(categories(b=30, a=10), categories(b=5, a=15)) == pytest.approx(one)


def test_a_share_that_grew_is_significant_and_one_that_shrank_is_not() -> None:
    few, many = categories(yes=5, no=95), categories(yes=15, no=15)
    assert compare_shares(few, many, YES) < 1e-5
    assert compare_shares(many, few, YES) > 0.99


def alike(draw: Callable[[np.random.Generator, int], NDArray[Any]], compare: Callable[..., float]) -> int:
    """How often what is drawn alike is called different at the customary level."""
    generator = np.random.default_rng(1)
    return sum(compare(draw(generator, 24), draw(generator, 10)) <= 0.05 for _ in range(REPEATS))


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda generator, size: generator.normal(size=size), id="all different"),
        pytest.param(lambda generator, size: generator.integers(0, 4, size).astype(float), id="many equal"),
        pytest.param(
            lambda generator, size: np.where(generator.random(size) < 0.3, NAN, generator.normal(size=size)),
            id="often not there",
        ),
    ],
)
def test_numbers_that_are_drawn_alike_are_called_as_rarely_as_the_level_says(
    draw: Callable[[np.random.Generator, int], Floats],
) -> None:
    assert alike(draw, compare_numbers) <= binom.ppf(SURE, REPEATS, 0.05)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.4, 0.3, 0.2, 0.1), (0.1,) * 10])
def test_categories_that_are_drawn_alike_are_called_as_rarely_as_the_level_says(shares: tuple[float, ...]) -> None:
    all_names = np.array([f"name {place}" for place in range(len(shares))])
    called = alike(lambda generator, size: generator.choice(all_names, size, p=shares), compare_categories)
    assert called <= binom.ppf(SURE, REPEATS, 0.05)


def test_shares_that_are_drawn_alike_are_called_as_rarely_as_the_level_says() -> None:
    called = alike(
        lambda generator, size: np.where(generator.random(size) < 0.3, YES, NO),
        lambda reference, live: compare_shares(reference, live, YES),
    )
    assert called <= binom.ppf(SURE, REPEATS, 0.05)


@pytest.mark.parametrize("by", [0.5, 1.0, 2.0])
def test_a_larger_shift_has_a_larger_stability_index(by: float) -> None:
    reference = normals(1, 500)
    assert number_stability(reference, reference + by).index > number_stability(reference, reference + by / 2).index


@pytest.mark.parametrize("live", [0.5, 1.5])
def test_where_all_numbers_are_equal_another_number_is_a_shift_on_either_side(live: float) -> None:
    assert number_stability(np.ones(200), np.full(100, live)).index > 0.2


def test_a_new_category_is_a_shift_by_custom() -> None:
    assert category_stability(categories(en=100), categories(en=50, de=50)).index > 0.2


def test_a_stability_index_is_that_of_the_definition() -> None:
    # Shares of a half against three quarters and a quarter; the half count that is added vanishes in so many.
    found = category_stability(categories(a=50_000, b=50_000), categories(a=75_000, b=25_000)).index
    assert found == pytest.approx(0.25 * np.log(1.5) - 0.25 * np.log(0.5), rel=1e-3)


def test_false_discovery_rates_are_benjamini_and_hochbergs() -> None:
    # The example of Benjamini and Hochberg 1995, Journal of the Royal Statistical Society B 57:289: at 0.05 the four
    # smallest are called.
    p_values = [
        *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344),
        *(0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000),
    ]
    adjusted = false_discovery_rates(p_values)
    assert [rate <= 0.05 for rate in adjusted] == [True] * 4 + [False] * 11
    assert adjusted[3] == pytest.approx(0.0095 * 15 / 4)


def test_of_nothing_there_are_no_false_discoveries() -> None:
    assert false_discovery_rates([]) == []


def test_a_stability_beyond_chance_is_about_zero_where_nothing_moved() -> None:
    generator = np.random.default_rng(3)
    found = [number_stability(generator.normal(size=200), generator.normal(size=50)) for _ in range(200)]
    assert np.mean([one.index for one in found]) == pytest.approx(found[0].by_chance, rel=0.15)
    assert np.median([one.beyond_chance for one in found]) < 0.02


counts = st.integers(1, 3_000).flatmap(lambda size: st.tuples(st.integers(0, size), st.just(size)))


@given(counts, counts)
def test_fishers_test_is_scipys(first: tuple[int, int], second: tuple[int, int]) -> None:
    (ones, size), (others, other_size) = first, second
    expected = fisher_exact([[ones, size - ones], [others, other_size - others]]).pvalue
    assert fisher(ones, size, others, other_size) == pytest.approx(float(expected), rel=1e-7, abs=1e-300)
