"""Tests that the stability index measures the size of a shift for any values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.drift.report import category_stability, number_stability
from svc.drift_reference.sample import NOT_THERE, Floats, Names

NAN = float("nan")

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
def test_stability_index_is_non_negative_for_any_numbers(reference: Floats, live: Floats) -> None:
    assert number_stability(reference, live).index >= 0


@given(names, names)
def test_stability_index_is_non_negative_for_any_categories(reference: Names, live: Names) -> None:
    assert category_stability(reference, live).index >= 0


@given(numbers)
def test_stability_index_is_0_for_identical_numbers(values: Floats) -> None:
    assert number_stability(values, values).index == 0.0


@given(names)
def test_stability_index_is_0_for_identical_categories(values: Names) -> None:
    assert category_stability(values, values).index == 0.0


@pytest.mark.parametrize("nothing", [np.empty(0), np.full(5, NAN)])
def test_stability_index_is_0_if_either_side_has_no_numbers(nothing: Floats) -> None:
    assert number_stability(upto(9), nothing).index == number_stability(nothing, upto(9)).index == 0.0


def test_stability_index_is_0_without_categories() -> None:
    assert category_stability(categories(en=9), np.array([NOT_THERE])).index == 0.0


def test_stability_index_ignores_missing_numbers() -> None:
    reference, live = normals(1, 40), normals(2, 20, at=0.8)
    holes = np.full(7, NAN)
    with_holes = np.concatenate([holes, reference, holes]), np.concatenate([live, holes])
    assert number_stability(*with_holes) == number_stability(reference, live)


def test_stability_index_ignores_missing_categories() -> None:
    reference, live, holes = categories(en=30, de=10), categories(en=8, de=12), np.array([NOT_THERE] * 7)
    with_holes = np.concatenate([holes, reference]), np.concatenate([live, holes])
    assert category_stability(*with_holes) == category_stability(reference, live)


def test_stability_index_grows_with_the_shift() -> None:
    reference = normals(1, 500)
    small, medium, large, largest = (number_stability(reference, reference + by).index for by in (0.25, 0.5, 1.0, 2.0))
    assert small < medium < large < largest


@pytest.mark.parametrize("live", [0.5, 1.5])
def test_stability_index_exceeds_0_2_if_live_values_differ_from_a_constant_reference(live: float) -> None:
    assert number_stability(np.ones(200), np.full(100, live)).index > 0.2


def test_stability_index_exceeds_0_2_if_half_of_live_items_have_a_new_category() -> None:
    assert category_stability(categories(en=100), categories(en=50, de=50)).index > 0.2


def test_stability_index_matches_its_definition() -> None:
    # Shares of a half compared with three quarters and a quarter; the added half count is negligible for so many items.
    index = category_stability(categories(a=50_000, b=50_000), categories(a=75_000, b=25_000)).index
    assert index == pytest.approx(0.25 * np.log(1.5) - 0.25 * np.log(0.5), rel=1e-3)


def test_chance_corrected_stability_index_is_about_0_without_drift() -> None:
    generator = np.random.default_rng(3)
    shifts = [number_stability(generator.normal(size=200), generator.normal(size=50)) for _ in range(200)]
    assert np.mean([one.index for one in shifts]) == pytest.approx(shifts[0].by_chance, rel=0.15)
    assert np.median([one.beyond_chance for one in shifts]) < 0.02
