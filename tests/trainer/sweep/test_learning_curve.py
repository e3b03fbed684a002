"""Tests learning curves: known power laws are recovered, and all other curves are not extrapolated."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.evaluation.intervals import Interval, mean
from trainer.sweep.learning_curve import Benefit, LearningCurve, Point, extrapolate, fit, nested_subsets

SIZES = (100, 250, 500, 1000)
BASE = Interval(value=3, low=3, high=3)


def curve_of(losses: tuple[float, ...], noise: float = 0.0, sizes: tuple[int, ...] = SIZES) -> LearningCurve:
    """Return the losses of 50 held-out examples of varying difficulty. `noise` is the spread of their gains."""
    generator = np.random.default_rng(1)
    level = generator.normal(0, 0.3, 50)
    each = [loss + level - level.mean() for loss in losses]
    each = [row + noise * (shift - shift.mean()) for row in each for shift in [generator.normal(size=50)]]
    points = [
        Point(examples=size, loss=mean(row.tolist()), steps=1, seconds=1) for size, row in zip(sizes, each, strict=True)
    ]
    return extrapolate(points, [row.tolist() for row in each], [1] * 50, BASE)


@given(st.floats(0, 2), st.floats(0.5, 20), st.floats(0.1, 1.5))
def test_fit_recovers_a_known_power_law(floor: float, scale: float, exponent: float) -> None:
    sizes = np.array(SIZES, dtype=float)
    fitted = fit(sizes, (floor + scale * sizes**-exponent)[None])[0]
    predicted = fitted[0] + fitted[1] * 2000.0 ** -fitted[2]
    fall = scale * (100**-exponent - 2000**-exponent)
    assert predicted == pytest.approx(floor + scale * 2000**-exponent, abs=0.03 * fall)


def test_gain_from_doubling_the_data_is_predicted_by_a_power_law() -> None:
    losses = tuple(0.2 + 5 * size**-0.5 for size in SIZES)
    curve = curve_of(losses, noise=0.01)
    assert curve.gain is not None
    true = 5 * 1000**-0.5 - 5 * 2000**-0.5
    assert curve.gain.low <= true <= curve.gain.high
    assert curve.gain.value == pytest.approx(true, rel=0.1)
    assert curve.verdict is Benefit.WORTH
    assert curve.sentence.startswith("Twice the data would lower held-out loss by about 0.04")


def test_flat_learning_curve_predicts_little_benefit_from_more_data() -> None:
    curve = curve_of(tuple(1.0 + 1e3 * size**-2.0 for size in SIZES), noise=0.001)
    assert curve.verdict is Benefit.LITTLE


def test_benefit_of_more_data_is_unknown_when_noise_hides_the_gain() -> None:
    curve = curve_of(tuple(0.2 + 2 * size**-0.3 for size in SIZES), noise=0.4)
    assert curve.verdict is Benefit.UNKNOWN


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ((1.0, 1.1, 1.2, 1.3), "held-out loss did not fall with more data"),
        ((2.0, 1.0, 2.0, 1.0), "no power law fits the points"),
    ],
)
def test_gain_from_more_data_is_not_predicted_when_points_do_not_follow_a_power_law(
    losses: tuple[float, ...], why: str
) -> None:
    curve = curve_of(losses)
    assert curve.verdict is Benefit.UNKNOWN
    assert (curve.gain, curve.doubled, curve.law) == (None, None, None)
    assert why in curve.sentence


def test_gain_from_more_data_is_not_predicted_from_only_three_points() -> None:
    assert "needs 4" in curve_of((3.0, 2.0, 1.5), sizes=(2, 4, 8)).sentence


@pytest.mark.slow
@given(st.lists(st.sampled_from("abc"), min_size=20, max_size=200), st.integers(0, 5))
def test_learning_curve_subsets_are_nested_and_stratified_by_label(labels: list[str], seed: int) -> None:
    parts = nested_subsets(labels, seed)
    assert len(parts[-1]) == len(labels)
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) < set(larger)
    for part in parts:
        for label in set(labels):
            expected = labels.count(label) * len(part) / len(labels)
            assert abs(sum(labels[place] == label for place in part) - expected) <= 2


def test_learning_curve_subsets_differ_with_the_seed() -> None:
    labels = [str(number) for number in range(50)]
    assert nested_subsets(labels, 0)[0] != nested_subsets(labels, 1)[0]
