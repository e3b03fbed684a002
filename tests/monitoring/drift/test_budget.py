"""The budget of false alarms."""

from monitoring.drift.budget import FALSE_ALARMS_PER_REQUEST, SIGNAL_SHARES, Signal


def test_at_most_a_tenth_of_a_false_alarm_is_expected_in_10000_requests() -> None:
    assert round(10_000 * FALSE_ALARMS_PER_REQUEST, 9) == 0.1


def test_all_signals_together_have_the_whole_budget() -> None:
    assert set(SIGNAL_SHARES) == set(Signal)
    assert round(sum(SIGNAL_SHARES.values()), 9) == 1
