"""Simulated rollouts end as the analysis decides, or at a deadline."""

from benchmarks.rollout.canary import DEADLINE_S, MIN_UNITS, End, decide
from benchmarks.rollout.traffic import Kind, Version, generate


def test_candidate_with_mostly_invalid_outputs_is_rolled_back_after_few_requests() -> None:
    decision = decide(generate(Kind("invalid", Version(invalid=0.6)), 600.0, seed=1))
    assert decision.end is End.ROLLED_BACK
    assert decision.exposed < 60
    assert decision.after_s < 200


def test_faultless_candidate_reaches_all_traffic_before_the_deadline() -> None:
    perfect = Version(errors=0.0, invalid=0.0, slower=0.5, bad=0.0)
    decision = decide(generate(Kind("perfect", perfect), DEADLINE_S, seed=2))
    assert decision.end is End.FULL
    assert decision.exposed > 2 * MIN_UNITS
    assert decision.after_s < DEADLINE_S


def test_rollout_is_undecided_when_traffic_ends_before_a_decision() -> None:
    decision = decide(generate(Kind("equal"), 60.0, seed=3))
    assert (decision.end, decision.after_s) == (End.UNDECIDED, DEADLINE_S)
    assert 10 < decision.exposed < 60
