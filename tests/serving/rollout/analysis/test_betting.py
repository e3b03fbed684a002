"""Wrong decisions are within their budget at any time, and the limits of a loss agree with the decisions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.rollout.analysis.betting import (
    Budget,
    Evidence,
    Floats,
    difference_limits,
    exclusion,
    proof,
    wealth,
)
from svc.evaluation.verdict import GateOutcome

LARGE = Budget(wrong_rollback=0.1, wrong_advance=0.1)
"""Large probabilities, so that wrong decisions come often enough to be counted."""
STREAMS, BLOCKS = 200, 250
margins = st.sampled_from([0.0, 0.01, 0.05, 0.3])
differences = st.lists(st.sampled_from([-1.0, -0.5, -0.05, 0.0, 0.25, 1.0]), min_size=1, max_size=300)


def ever(stream: Floats, margin: float, outcome: GateOutcome) -> bool:
    """Return whether the evidence ever had this outcome, checked after each difference."""
    evidence = Evidence(margin)
    for difference in stream:
        evidence.add(float(difference))
        if evidence.outcome(LARGE) is outcome:
            return True
    return False


def wrong_share(streams: Floats, margin: float, outcome: GateOutcome) -> float:
    return sum(ever(stream, margin, outcome) for stream in streams) / len(streams)


@pytest.mark.slow
@pytest.mark.parametrize("production", [0.02, 0.2])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_wrong_decisions_are_rare_even_if_the_loss_equals_the_margin_and_is_checked_after_every_block(
    production: float, margin: float
) -> None:
    draw = np.random.default_rng(0)
    streams = (draw.random((STREAMS, BLOCKS)) < production + margin).astype(float)
    streams -= draw.binomial(10, production, (STREAMS, BLOCKS)) / 10
    assert wrong_share(streams, margin, GateOutcome.FAILED) <= LARGE.wrong_rollback
    assert wrong_share(streams, margin, GateOutcome.PASSED) <= LARGE.wrong_advance


@pytest.mark.slow
def test_false_positives_are_rare_when_rates_vary_with_the_time_of_day() -> None:
    draw = np.random.default_rng(1)
    rate = 0.2 + 0.2 * np.sin(np.arange(BLOCKS) / 20)
    streams = (draw.random((STREAMS, BLOCKS)) < rate) - draw.binomial(10, rate, (STREAMS, BLOCKS)) / 10
    assert wrong_share(streams, 0.0, GateOutcome.FAILED) <= LARGE.wrong_rollback


@given(differences, margins)
def test_confidence_limits_agree_with_the_test_outcome(values: list[float], margin: float) -> None:
    budget = Budget()
    evidence = Evidence(margin)
    for value in values:
        evidence.add(value)
    low, high = difference_limits(Counter(values), budget)
    tolerance = 1e-5
    assert low <= high + tolerance
    match evidence.outcome(budget):
        case GateOutcome.FAILED:
            assert low >= margin - tolerance
        case GateOutcome.PASSED:
            assert high <= margin + tolerance
        case GateOutcome.UNDECIDED:
            assert low <= margin + tolerance
            assert high >= margin - tolerance


@given(differences, margins)
def test_wealth_of_a_betting_test_does_not_depend_on_the_order_of_values(values: list[float], margin: float) -> None:
    counts = Counter(values)
    for payoffs in (proof, exclusion):
        one_by_one = wealth(payoffs(np.array(values), margin))
        counted = wealth(payoffs(np.array(list(counts)), margin), np.array(list(counts.values()), dtype=float))
        assert one_by_one == pytest.approx(counted, rel=1e-6)


@pytest.mark.slow
def test_confidence_limits_contain_the_true_difference_at_all_times() -> None:
    draw = np.random.default_rng(2)
    missed = 0
    for _ in range(60):
        stream = (draw.random(BLOCKS) < 0.3) - draw.binomial(5, 0.2, BLOCKS) / 5
        for seen in range(25, BLOCKS + 1, 25):
            low, high = difference_limits(Counter(stream[:seen].tolist()), LARGE)
            if not low <= 0.1 <= high:
                missed += 1
                break
    assert missed / 60 <= LARGE.wrong_rollback + LARGE.wrong_advance


@pytest.mark.slow
def test_evidence_stays_finite_for_a_rollout_of_any_length() -> None:
    evidence = Evidence(0.01)
    for _ in range(20_000):
        evidence.add(1.0)
    assert evidence.outcome(Budget()) is GateOutcome.FAILED


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1])
def test_error_budget_rejects_probabilities_outside_0_to_1(probability: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Budget(wrong_rollback=probability)
