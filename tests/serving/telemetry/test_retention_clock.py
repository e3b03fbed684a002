"""Tests that a jump of the wall clock deletes no rows, while a steady clock deletes those that are too old."""

from datetime import UTC, datetime, timedelta

import pytest

from serving.telemetry.retention_clock import RetentionClock

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MONTH = timedelta(days=30)
HOUR = timedelta(hours=1)


class Clocks:
    """A wall clock and the time since boot, which advance together until the wall clock is set."""

    def __init__(self, newest: datetime | None = NOON, max_age: timedelta = MONTH) -> None:
        self.wall, self.elapsed_s, self.newest = NOON, 100.0, newest
        self.retention = RetentionClock(max_age, now=lambda: self.wall, elapsed_s=lambda: self.elapsed_s)

    def after(self, passed: timedelta, *, jump: timedelta = timedelta()) -> datetime | None:
        """Advance the time, with an optional wall-clock jump, and return the time before which rows are too old."""
        self.wall += passed + jump
        self.elapsed_s += passed.total_seconds()
        return self.retention.oldest_kept(lambda: self.newest)


def test_rows_expire_at_the_maximum_age_while_the_wall_clock_is_steady() -> None:
    clocks = Clocks()
    for _ in range(3):
        assert clocks.after(timedelta(days=10)) == clocks.wall - MONTH


def test_no_row_expires_while_the_clock_is_temporarily_a_year_ahead(caplog: pytest.LogCaptureFixture) -> None:
    clocks, year = Clocks(), timedelta(days=365)
    clocks.after(HOUR)
    assert clocks.after(timedelta(minutes=1), jump=year) is None
    assert clocks.after(timedelta(minutes=1)) is None
    assert clocks.after(timedelta(minutes=1), jump=-year) == clocks.wall - MONTH
    assert [record.getMessage() for record in caplog.records] == [
        "the clock jumped by 365 days, 0:00:00; not deleting requests by age until the clock has been steady for "
        "1 day, 0:00:00"
    ]


@pytest.mark.parametrize("jump", [timedelta(days=365), timedelta(days=-365), 2 * HOUR])
def test_clock_is_trusted_again_after_a_day_without_another_jump(jump: timedelta) -> None:
    clocks = Clocks()
    clocks.after(HOUR)
    assert clocks.after(HOUR, jump=jump) is None
    assert clocks.after(23 * HOUR) is None
    assert clocks.after(HOUR) == clocks.wall - MONTH
    assert clocks.after(HOUR) == clocks.wall - MONTH


def test_second_clock_jump_restarts_the_one_day_wait() -> None:
    clocks = Clocks()
    clocks.after(HOUR)
    clocks.after(HOUR, jump=timedelta(days=365))
    assert clocks.after(23 * HOUR, jump=timedelta(days=7)) is None
    assert clocks.after(23 * HOUR) is None
    assert clocks.after(HOUR) == clocks.wall - MONTH


def test_clock_stays_trusted_if_adjusted_by_less_than_an_hour() -> None:
    clocks = Clocks()
    clocks.after(HOUR)
    for _ in range(5):
        assert clocks.after(HOUR, jump=timedelta(minutes=50)) == clocks.wall - MONTH


def test_no_row_expires_for_a_day_if_all_are_too_old_at_startup(caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks(newest=NOON - 2 * MONTH)
    assert clocks.after(HOUR) is None
    clocks.newest = clocks.wall
    assert clocks.after(23 * HOUR) is None
    assert clocks.after(HOUR) == clocks.wall - MONTH
    assert len(caplog.records) == 1 and "all stored requests are older" in caplog.text


def test_clock_is_trusted_immediately_if_there_are_no_rows_at_startup() -> None:
    clocks = Clocks(newest=None)
    assert clocks.after(HOUR) == clocks.wall - MONTH


def test_clock_is_trusted_again_after_the_maximum_row_age_if_that_age_is_less_than_a_day() -> None:
    clocks = Clocks(newest=NOON - 9 * HOUR, max_age=2 * HOUR)
    assert clocks.after(HOUR) is None
    assert clocks.after(2 * HOUR) == clocks.wall - 2 * HOUR
