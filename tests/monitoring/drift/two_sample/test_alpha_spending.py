"""All tests of all signals together cost no more false alarms than were promised."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from monitoring.drift.two_sample.alpha_spending import FALSE_ALARMS_PER_REQUEST, SIGNAL_SHARES, WINDOWS, Signal, usable

from monitoring.drift.detector import Detector, Watch
from monitoring.drift.signals import answer_tests, input_tests, rating_tests
from svc.drift_reference.sample import Sample

REQUESTS = 10_000
PROMISED = 0.1


@dataclass(frozen=True)
class Expense:
    """Finds nothing, and writes down the levels at which it was asked."""

    share: float
    levels: list[float] = field(default_factory=list)
    name: str = "expense"

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        self.levels.append(alpha)
        return 1.0


def spent(reference: int) -> float:
    """The levels of all tests that all signals make, added up."""
    levels = []
    for signal in Signal:
        test = Expense(share=1.0)
        Detector([test], reference, SIGNAL_SHARES[signal]).advance(Watch(), Sample(REQUESTS), REQUESTS)
        levels += test.levels
    return sum(levels)


def sample() -> Sample:
    values = np.arange(20, dtype=np.float64)
    texts = np.stack([values, values[::-1]], axis=1)
    return Sample(20, {"length": values}, {"language": np.array(["en", "de"] * 10)}, (texts, texts))


@pytest.mark.parametrize("reference", [20, 60, 100, 200])
def test_ten_thousand_requests_cost_at_most_a_tenth_of_a_false_alarm(reference: int) -> None:
    assert spent(reference) <= PROMISED * (1 + 1e-9)


def test_the_budget_is_used() -> None:
    assert spent(200) > 0.98 * PROMISED


def test_a_day_is_promised_what_ten_thousand_requests_are() -> None:
    assert pytest.approx(PROMISED) == REQUESTS * FALSE_ALARMS_PER_REQUEST


def test_the_signals_share_one_budget() -> None:
    assert sum(SIGNAL_SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("signal", list(Signal))
def test_the_tests_of_a_signal_share_its_budget(signal: Signal) -> None:
    reference = sample()
    ratings = Sample(2, {}, {"bad_ratings": np.array(["yes", "no"]), "corrections": np.array(["no", "no"])})
    shares = {
        Signal.INPUT: [test.share for test in input_tests(reference)],
        Signal.OUTPUT: [test.share for test in answer_tests(reference)],
        Signal.PEOPLE: [test.share for test in rating_tests(ratings)],
    }
    assert sum(shares[signal]) == pytest.approx(1)


@pytest.mark.parametrize("reference", [20, 59, 60, 100, 199, 200, 5000])
def test_windows_are_at_most_half_the_reference(reference: int) -> None:
    assert all(2 * window.size <= reference for window in usable(WINDOWS, reference))


@pytest.mark.parametrize("reference", [20, 59, 60, 100, 199, 200, 5000])
def test_windows_that_are_left_have_all_of_the_budget(reference: int) -> None:
    assert sum(window.share for window in usable(WINDOWS, reference)) == pytest.approx(1)


@pytest.mark.parametrize("reference", [0, 1, 5, 19])
def test_a_reference_that_is_too_small_has_no_windows(reference: int) -> None:
    assert usable(WINDOWS, reference) == ()


def test_a_window_that_is_compared_less_often_may_spend_more_each_time() -> None:
    window = WINDOWS[0]
    rare = type(window)(window.size, 2 * window.every, window.share)
    assert rare.alpha(1e-5) == pytest.approx(2 * window.alpha(1e-5))
