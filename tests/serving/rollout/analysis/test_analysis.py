"""Equal candidates are not rolled back, bad ones are, and missing data holds no rollout."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from serving.rollout.analysis.analysis import Analysis, Margins, Signal, SignalVerdict
from serving.rollout.analysis.betting import Budget
from serving.rollout.analysis.units import Arm, Rating, Request
from svc.evaluation.verdict import GateOutcome

LARGE = Budget(wrong_rollback=0.2, wrong_advance=0.2)
"""Large probabilities, so that wrong decisions come often enough to be counted."""


@dataclass(frozen=True)
class Rates:
    """Rates of one version."""

    errors: float = 0.0
    invalid: float = 0.0
    slower: float = 1.0


def requests(
    draw: np.random.Generator, production: Rates, candidate: Rates, *, share: float = 0.25, session: int = 1
) -> Iterator[Request]:
    """Yield requests of users with `session` requests each; the requests of a user fail or succeed together."""
    start = 0.0
    while True:
        arm = Arm.CANDIDATE if draw.random() < share else Arm.PRODUCTION
        rates = candidate if arm is Arm.CANDIDATE else production
        failed, valid = draw.random() < rates.errors, draw.random() >= rates.invalid
        for _ in range(session):
            start += 1.0
            seconds = None if failed else float(draw.lognormal(0, 0.5)) * rates.slower
            unit = f"user {start // session}" if session > 1 else None
            yield Request(unit, arm, start, failed, None if failed else valid, seconds)


def decided_after(analysis: Analysis, traffic: Iterator[Request], at_most: int) -> int | None:
    """Return the number of requests until the analysis is decided, checked after every fifth request."""
    for number, request in enumerate(islice(traffic, at_most), 1):
        analysis.add(request)
        if number % 5 == 0 and analysis.outcome is not GateOutcome.UNDECIDED:
            return number
    return None


def verdict(analysis: Analysis, signal: Signal) -> SignalVerdict:
    return next(verdict for verdict in analysis.verdicts() if verdict.signal is signal)


@pytest.mark.slow
@pytest.mark.parametrize("session", [1, 5])
def test_candidates_equal_to_production_are_rarely_rolled_back_even_with_a_check_after_every_request(
    session: int,
) -> None:
    draw = np.random.default_rng(0)
    rates, failed = Rates(errors=0.1, invalid=0.1), 0
    for _ in range(40):
        analysis = Analysis(Margins(errors=0.0, invalid=0.0, first_token=1.0), LARGE)
        for request in islice(requests(draw, rates, rates, session=session), 600):
            analysis.add(request)
            if GateOutcome.FAILED in analysis.outcomes.values():
                failed += 1
                break
    assert failed / 40 <= LARGE.wrong_rollback


@pytest.mark.slow
def test_increase_from_2_to_10_percent_invalid_outputs_is_proven_within_800_candidate_observations() -> None:
    draw, units = np.random.default_rng(1), []
    for _ in range(10):
        analysis = Analysis()
        decided_after(analysis, requests(draw, Rates(invalid=0.02), Rates(invalid=0.1)), 6_000)
        assert analysis.outcomes[Signal.INVALID] is GateOutcome.FAILED
        units.append(analysis.units)
    assert np.median(units) < 400
    assert max(units) < 800


def test_candidate_with_30_percent_invalid_outputs_fails_within_100_observations() -> None:
    analysis = Analysis()
    decided_after(analysis, requests(np.random.default_rng(2), Rates(), Rates(invalid=0.3)), 2_000)
    assert analysis.outcome is GateOutcome.FAILED
    assert analysis.units < 100


@pytest.mark.slow
def test_candidate_equal_to_production_passes_and_slower_candidate_fails() -> None:
    equal, slow = Analysis(), Analysis()
    decided_after(equal, requests(np.random.default_rng(3), Rates(), Rates()), 20_000)
    decided_after(slow, requests(np.random.default_rng(3), Rates(), Rates(slower=1.6)), 20_000)
    assert equal.outcome is GateOutcome.PASSED
    assert slow.outcomes[Signal.FIRST_TOKEN] is GateOutcome.FAILED
    loss = verdict(slow, Signal.FIRST_TOKEN).loss
    assert loss is not None
    assert 1.2 < loss.low < loss.value < loss.high
    assert loss.low < 1.6 < loss.high


@pytest.mark.slow
def test_equal_candidate_passes_without_many_more_requests_when_production_was_slower_before() -> None:
    """While the candidate's engine starts, it takes processor time from production."""
    draw, observed = np.random.default_rng(9), {}
    for slower in (1.0, 3.0):
        analyses = [Analysis() for _ in range(5)]
        for analysis in analyses:
            for request in islice(requests(draw, Rates(slower=slower), Rates(), share=0.0), 400):
                analysis.add(request)
            assert decided_after(analysis, requests(draw, Rates(), Rates()), 20_000)
        observed[slower] = np.median([analysis.units for analysis in analyses])
    assert observed[3.0] < 2 * observed[1.0]


@pytest.mark.slow
def test_candidate_slower_by_exactly_the_margin_is_rarely_rolled_back() -> None:
    draw, failed = np.random.default_rng(4), 0
    for _ in range(25):
        analysis = Analysis(budget=LARGE)
        decided_after(analysis, requests(draw, Rates(), Rates(slower=1.2)), 800)
        failed += analysis.outcomes[Signal.FIRST_TOKEN] is GateOutcome.FAILED
    assert failed / 25 <= LARGE.wrong_rollback


@pytest.mark.slow
def test_one_client_with_most_failures_does_not_fail_the_candidate() -> None:
    analysis = Analysis()
    for second, request in enumerate(islice(requests(np.random.default_rng(5), Rates(), Rates()), 5_000)):
        analysis.add(request)
        analysis.add(Request("heavy", Arm.CANDIDATE, float(second), failed=True))
    assert analysis.outcome is not GateOutcome.FAILED
    assert analysis.outcomes[Signal.ERRORS] is GateOutcome.PASSED


def test_signal_without_data_is_undecided_and_does_not_block_a_rollout() -> None:
    analysis = Analysis()
    for second in range(4_000):
        analysis.add(Request(None, Arm.CANDIDATE if second % 3 == 0 else Arm.PRODUCTION, float(second)))
    feedback = verdict(analysis, Signal.FEEDBACK)
    assert (feedback.outcome, feedback.has_data, feedback.loss) == (GateOutcome.UNDECIDED, False, None)
    assert (feedback.production.units, feedback.production.value) == (0, None)
    assert verdict(analysis, Signal.ERRORS).has_data
    assert analysis.outcome is GateOutcome.PASSED


def test_bad_ratings_fail_the_candidate_and_each_rater_counts_once_per_rollout_step() -> None:
    analysis, draw = Analysis(), np.random.default_rng(6)
    for _ in range(50):
        analysis.rate(Rating("angry", Arm.CANDIDATE, negative=True))
        analysis.rate(Rating("angry in production", Arm.PRODUCTION, negative=True))
    analysis.start_step()
    analysis.rate(Rating("angry", Arm.CANDIDATE, negative=True))
    analysis.rate(Rating("angry in production", Arm.CANDIDATE, negative=False))
    feedback = verdict(analysis, Signal.FEEDBACK)
    assert (feedback.candidate.units, feedback.candidate.value) == (2, 0.5)
    assert (feedback.production.units, feedback.production.value) == (1, 1.0)
    for _ in range(1_000):
        analysis.rate(Rating(None, Arm.CANDIDATE, draw.random() < 0.5))
        analysis.rate(Rating(None, Arm.PRODUCTION, draw.random() < 0.2))
    assert analysis.outcome is GateOutcome.FAILED


@pytest.mark.slow
def test_verdicts_do_not_depend_on_how_often_they_are_computed() -> None:
    traffic = list(islice(requests(np.random.default_rng(7), Rates(0.02), Rates(0.03, 0.05), session=3), 2_000))
    first, second = Analysis(), Analysis()
    for place, request in enumerate(traffic):
        if place == 1_000:
            first.start_step()
        first.add(request)
        if place % 200 == 0:
            first.verdicts()
    for place, request in enumerate(traffic):
        if place == 1_000:
            second.start_step()
        second.add(request)
    assert first.verdicts() == second.verdicts()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.25])
def test_detectable_degradation_is_proven_in_about_80_percent_of_rollouts(share: float) -> None:
    units, production, draw = 250, 0.02, np.random.default_rng(8)
    loss = Analysis().detectable(units, share)[Signal.INVALID]
    proven = 0
    for _ in range(25):
        analysis = Analysis()
        for request in requests(draw, Rates(invalid=production), Rates(invalid=production + loss), share=share):
            analysis.add(request)
            if request.arm is Arm.CANDIDATE and (analysis.units == units or analysis.outcome is GateOutcome.FAILED):
                break
        proven += analysis.outcomes[Signal.INVALID] is GateOutcome.FAILED
    assert 0.65 <= proven / 25 < 1.0


def test_smallest_detectable_degradation_shrinks_with_more_observations_but_stays_above_the_margin() -> None:
    margins, analysis = Margins(), Analysis()
    few, many = analysis.detectable(200, 0.05), analysis.detectable(20_000, 0.05)
    for signal in Signal:
        assert few[signal] > many[signal] > getattr(margins, signal.value)


@pytest.mark.parametrize("wrong", [{"errors": -0.01}, {"feedback": 1.0}, {"first_token": 0.9}])
def test_impossible_margins_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="margins must be in"):
        Margins(**wrong)
