"""The tables show every kind and policy, with limits that fit the counts."""

import pytest

from benchmarks.rollout.canary import Decision, End
from benchmarks.rollout.simulation import POLICIES, Decisions
from benchmarks.rollout.table import lines, upper_limit
from benchmarks.rollout.traffic import AT_MARGIN, BAD, EQUAL, Kind


def test_upper_confidence_limit_matches_the_clopper_pearson_interval() -> None:
    assert upper_limit(0, 1000) == pytest.approx(0.003682, abs=1e-5)
    assert upper_limit(5, 1000) == pytest.approx(0.01163, abs=1e-4)
    assert upper_limit(3, 3) == 1.0


def test_tables_show_false_rollbacks_and_exposed_requests_per_policy() -> None:
    full, back = Decision(End.FULL, 4000, 7200.0), Decision(End.ROLLED_BACK, 150, 300.0)
    decisions: dict[Kind, Decisions] = {kind: dict.fromkeys(POLICIES, [full] * 20) for kind in EQUAL}
    decisions |= {kind: dict.fromkeys(POLICIES, [back] * 19 + [full]) for kind in (*AT_MARGIN, *BAD)}
    equal, _, bad = "\n".join(lines(decisions)).partition("\n\n")
    assert f"| rollouts | {' | '.join(['20'] * len(EQUAL))} | 80 |" in equal
    assert equal.count("0.0% (at most 16.8%)") == len(EQUAL) * len(POLICIES)
    assert equal.count("0.0% (at most 4.5%)") == len(POLICIES)
    assert bad.count("150 / 150 (5%)") == (len(BAD) + 1) * len(POLICIES)


def test_exposure_percentile_is_shown_as_never_when_too_few_rollouts_are_rolled_back() -> None:
    full, back = Decision(End.FULL, 4000, 7200.0), Decision(End.ROLLED_BACK, 150, 300.0)
    decisions: dict[Kind, Decisions] = {kind: dict.fromkeys(POLICIES, [back] * 12 + [full] * 8) for kind in EQUAL}
    decisions |= dict.fromkeys((*AT_MARGIN, *BAD), decisions[EQUAL[0]])
    assert "150 / never (40%)" in list(lines(decisions))[-2]
