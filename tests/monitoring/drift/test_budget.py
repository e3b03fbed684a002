"""Tests the false-alarm budget."""

from monitoring.drift.budget import FALSE_ALARMS_PER_REQUEST, SIGNAL_SHARES, Signal


def test_expected_false_alarms_are_at_most_one_tenth_per_10000_requests() -> None:
    assert round(10_000 * FALSE_ALARMS_PER_REQUEST, 9) == 0.1


def test_whole_false_alarm_budget_is_divided_among_all_signals() -> None:
    assert set(SIGNAL_SHARES) == set(Signal)
    assert round(sum(SIGNAL_SHARES.values()), 9) == 1
