"""Tests the bounds of the value sets that bets are on, and which values are in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from monitoring.drift.bets import SLACK, SURE, Bet, feature_bets, hit_table, upper_limit
from monitoring.drift.evidence import HIT, MISS
from monitoring.drift.evidence import NOT_THERE as NO_HIT
from svc.drift_reference.sample import NOT_THERE, Floats, Names, Sample

NAN = float("nan")

counts = st.integers(1, 5_000).flatmap(lambda size: st.tuples(st.integers(0, size), st.just(size)))
numbers = st.lists(st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0, NAN]), max_size=80)
names = st.lists(st.sampled_from(["a", "b", "c", NOT_THERE]) | st.text("xyz", max_size=3), max_size=80)


def of_numbers(values: list[float] | Floats) -> Sample:
    return Sample(len(values), {"length": np.array(values, dtype=np.float64)})


def of_names(values: list[str] | Names) -> Sample:
    return Sample(len(values), {}, {"reason": np.array(values, dtype=np.str_)})


def hit_shares(bets: list[Bet], items: Sample) -> list[float]:
    """Return, for each bet, the share of items that are in its set."""
    return [float(share) for share in (hit_table(bets, items) == HIT).mean(axis=0)]


def largest_win(reference: Sample, item: Sample) -> float:
    """Return the factor by which the best bet grows with each such item, or 0 if the item is in no set."""
    bets = feature_bets(reference)
    return max((1 / bet.bound for bet in bets if hit_table([bet], item)[0, 0] == HIT), default=0.0)


@given(counts, st.sampled_from([1.0, 2.0]))
def test_upper_limit_of_a_proportion_equals_the_upper_end_of_the_wilson_interval(
    count: tuple[int, int], z: float
) -> None:
    level = 1 - 2 * norm.sf(z)
    expected = binomtest(*count).proportion_ci(level, method="wilson").high
    assert upper_limit(*count, z) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [1, 10, 200])
def test_upper_limit_of_a_proportion_is_positive_even_if_the_count_is_zero(size: int) -> None:
    assert upper_limit(0, size, 1.0) == pytest.approx(1 / (size + 1))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
def test_upper_confidence_limit_of_a_share_rises_as_the_reference_shrinks(share: float) -> None:
    bounds = [upper_limit(round(share * size), size, 1.64) for size in (2_000, 500, 100, 50)]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]


def test_tail_bets_cover_both_tails_and_their_hit_rates_stay_below_the_bounds_if_there_is_no_drift() -> None:
    generator = np.random.default_rng(1)
    bets = feature_bets(of_numbers(generator.normal(size=1000)))
    assert len(bets) == 6
    shares = hit_shares(bets, of_numbers(generator.normal(size=20_000)))
    assert all(share < bet.bound for share, bet in zip(shares, bets, strict=True))
    assert shares == pytest.approx([0.001, 0.001, 0.01, 0.01, 0.05, 0.05], abs=0.01)


@pytest.mark.parametrize("moved", [-10.0, 10.0])
def test_value_above_or_below_the_reference_range_is_in_every_tail_on_that_side(moved: float) -> None:
    bets = feature_bets(of_numbers(np.random.default_rng(1).normal(size=200)))
    assert sorted(hit_table(bets, of_numbers([moved]))[0].tolist()) == [MISS] * 3 + [HIT] * 3


def test_only_values_that_differ_from_a_constant_reference_can_be_evidence_of_drift() -> None:
    bets = feature_bets(of_numbers([3.0] * 200))
    assert all(bet.bound == pytest.approx(SLACK * upper_limit(0, 200, SURE)) for bet in bets)
    below, same, above = (hit_table(bets, of_numbers([value]))[0] for value in (2.0, 3.0, 4.0))
    assert HIT in below and HIT in above and HIT not in same


def test_new_and_minority_categories_can_be_evidence_of_drift_but_the_majority_category_cannot() -> None:
    reference = of_names(["stop"] * 90 + ["length"] * 10)
    assert largest_win(reference, of_names(["error"])) == pytest.approx(1 / (SLACK * upper_limit(0, 100, SURE)))
    assert largest_win(reference, of_names(["length"])) == pytest.approx(1 / (SLACK * upper_limit(10, 100, SURE)))
    assert largest_win(reference, of_names(["stop"])) == 0  # twice 90% is more than all


def test_rare_and_new_categories_are_strong_evidence_of_drift() -> None:
    reference = of_names(["stop"] * 198 + ["length"] * 2)
    assert largest_win(reference, of_names(["length"])) > 10
    assert largest_win(reference, of_names(["error"])) > 30


def test_hit_rates_of_rare_and_new_categories_stay_below_the_bounds_if_there_is_no_drift() -> None:
    generator = np.random.default_rng(1)
    kinds, shares = np.array([f"kind {number}" for number in range(60)]), np.full(60, 1 / 60)
    reference, live = (of_names(generator.choice(kinds, size, p=shares)) for size in (500, 20_000))
    bets = feature_bets(reference)
    assert all(share < bet.bound for share, bet in zip(hit_shares(bets, live), bets, strict=True))


def test_items_without_a_value_count_as_neither_hit_nor_miss() -> None:
    columns = Sample(
        60,
        {"length": np.array(range(60), dtype=np.float64)},
        {"reason": np.array(["stop", "length", "tool"] * 20)},
    )
    nothing = Sample(1, {"length": np.array([NAN])}, {"reason": np.array([NOT_THERE])})
    bets = feature_bets(columns)
    assert {bet.feature for bet in bets} == {"length", "reason"}
    assert set(hit_table(bets, nothing)[0].tolist()) == {NO_HIT}


def test_feature_without_reference_values_is_not_tested_for_drift() -> None:
    references = [of_numbers([]), of_numbers([NAN] * 9), of_names([]), of_names([NOT_THERE] * 9)]
    assert [feature_bets(reference) for reference in references] == [[]] * 4


def test_no_bets_are_placed_on_a_feature_with_only_one_reference_item() -> None:
    """Twice the upper share of a single item exceeds 1."""
    assert [feature_bets(reference) for reference in (of_numbers([1.0]), of_names(["a"]))] == [[], []]


def test_table_of_items_and_drift_bets_has_no_columns_if_there_are_no_bets() -> None:
    assert hit_table([], of_numbers([1.0, 2.0])).shape == (2, 0)


@pytest.mark.parametrize("sample", [of_numbers([float(value) for value in range(50)]), of_names(["a", "b"] * 25)])
def test_hit_table_has_no_rows_if_there_are_no_items(sample: Sample) -> None:
    bets = feature_bets(sample)
    assert hit_table(bets, sample.part(0, 0)).shape == (0, len(bets))


@given(numbers, names)
def test_every_bet_allows_at_least_twice_the_share_seen_in_the_reference(
    values: list[float], categories: list[str]
) -> None:
    for reference in (of_numbers(values), of_names(categories)):
        bets, table = feature_bets(reference), hit_table(feature_bets(reference), reference)
        there = (table != NO_HIT).sum(axis=0)
        for number, bet in enumerate(bets):
            assert 0 < bet.bound < 0.7
            assert (table[:, number] == HIT).sum() / there[number] <= bet.bound / SLACK


def test_new_category_is_no_evidence_of_drift_if_all_reference_items_are_distinct() -> None:
    """An example is system prompts that contain a date."""
    dated = Sample(50, {}, {"system_prompt": np.array([f"day {day}" for day in range(50)])})
    live = Sample(20, {}, {"system_prompt": np.array([f"day {day}" for day in range(50, 70)])})
    assert (hit_table(feature_bets(dated), live) != HIT).all()
