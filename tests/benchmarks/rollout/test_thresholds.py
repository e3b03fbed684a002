"""Fixed thresholds measure only the candidate, and calibrated limits keep the rate of wrong rollbacks."""

import numpy as np

from benchmarks.rollout import thresholds
from benchmarks.rollout.canary import End
from benchmarks.rollout.thresholds import FLAGGER, FLAGGER_LIMITS, NO_LIMIT, Policy, Windows
from benchmarks.rollout.traffic import Floats, Kind, Version, generate

POLICY = Policy("test", 60, 3, (300, 120))


def measured(values: Floats) -> Windows:
    """Return windows with 10 requests each."""
    count = len(values)
    numbers: Floats = np.arange(1, count + 1, dtype=np.float64)
    return Windows(values, 10 * numbers, 60 * numbers)


def test_simulated_faults_of_the_candidate_appear_in_the_measured_rollout_signals() -> None:
    bad = Version(errors=0.2, invalid=0.5, slower=3.0, bad=0.9)
    windows = thresholds.measure(generate(Kind("bad", bad), 600.0, seed=1), POLICY)
    assert windows.values.shape == (7, thresholds.SIGNALS)
    errors, invalid, first_token_s, negative = np.average(windows.values, axis=0)
    assert 0.1 < errors < 0.3
    assert 0.4 < invalid < 0.6
    assert 0.5 < first_token_s < 1.2
    assert negative > 0.7
    shares = np.diff(windows.exposed, prepend=0.0) / (60 * 10)
    assert (shares[:5] < 0.1).all()
    assert (shares[5:] > 0.2).all()


def test_candidate_is_rolled_back_when_enough_measurements_exceed_a_limit() -> None:
    values = np.zeros((8, 4))
    values[[1, 4, 6], 0] = 0.5
    decision = thresholds.decide(measured(values), POLICY, np.array([0.4, NO_LIMIT, NO_LIMIT, NO_LIMIT]))
    assert (decision.end, decision.exposed, decision.after_s) == (End.ROLLED_BACK, 70, 420)
    assert thresholds.decide(measured(values), POLICY, np.full(4, 0.5)).end is End.FULL


def test_calibrated_limits_keep_the_false_rollback_rate_below_the_target() -> None:
    draw = np.random.default_rng(2)
    equal = [measured(draw.random((20, 4))) for _ in range(400)]
    limits = thresholds.calibrate(equal, POLICY, 0.05)
    ends = [thresholds.decide(windows, POLICY, limits).end for windows in equal]
    assert 0.02 < ends.count(End.ROLLED_BACK) / 400 <= 0.05


def test_policy_that_advances_on_success_rolls_back_only_after_repeated_failures() -> None:
    limits = np.array(FLAGGER_LIMITS)
    failing = generate(Kind("failing", Version(errors=0.5)), 1200.0, seed=3)
    perfect = generate(Kind("perfect", Version(errors=0.0, slower=0.2)), 1200.0, seed=3)
    rolled_back = thresholds.advance_on_success(failing, FLAGGER, limits)
    assert (rolled_back.end, rolled_back.after_s) == (End.ROLLED_BACK, 5 * 60)
    full = thresholds.advance_on_success(perfect, FLAGGER, limits)
    assert (full.end, full.after_s) == (End.FULL, 2 * 60)
