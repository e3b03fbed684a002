"""Tests durations and times as users type them."""

from datetime import UTC, datetime, timedelta

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.access.time_options import duration, time_past, time_to_come


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("0", timedelta()),
        ("45s", timedelta(seconds=45)),
        ("30m", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("90d", timedelta(days=90)),
        ("2w", timedelta(days=14)),
    ],
)
def test_number_with_a_unit_is_parsed_as_a_duration(text: str, span: timedelta) -> None:
    assert duration(text) == span


@pytest.mark.parametrize(
    "text", ["", "90", "d", "-1d", "1.5h", "1y", "1d2h", "٣d", "36501d", "999999999w", "0001-01-01T00:00+02:00"]
)
def test_invalid_duration_is_rejected(text: str) -> None:
    with pytest.raises(click.BadParameter):
        duration(text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-12-31", datetime(2026, 12, 31, tzinfo=UTC)),
        ("2026-12-31T08:30", datetime(2026, 12, 31, 8, 30, tzinfo=UTC)),
        ("2026-12-31T08:30+02:00", datetime(2026, 12, 31, 6, 30, tzinfo=UTC)),
    ],
)
def test_past_and_future_time_options_parse_dates_identically(text: str, moment: datetime) -> None:
    assert time_past(text) == time_to_come(text) == moment


def test_duration_in_a_time_option_is_relative_to_the_current_time() -> None:
    now = datetime.now(UTC)
    assert abs(time_to_come("1h") - now - timedelta(hours=1)) < timedelta(seconds=5)
    assert abs(now - time_past("1h") - timedelta(hours=1)) < timedelta(seconds=5)


@given(st.text(max_size=12))
def test_any_text_given_as_a_time_is_parsed_or_raises_a_usage_error(text: str) -> None:
    try:
        found = time_past(text)
    except click.BadParameter:
        return
    assert found.tzinfo is UTC
