"""Tests that usage is summed by hour, key and model, including with concurrent writers."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import Engine as Store

from serving.access.usage import (
    DayOf,
    Usage,
    UsageOf,
    UsageTotal,
    add_usage,
    hour_of,
    last_used,
    midnight_of,
    usage_by_day,
    usage_since,
)

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
OF = UsageOf(NOON, "abcd0123", "tickets")


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def test_new_store_has_no_usage(store: Store) -> None:
    add_usage(store, {})
    assert (usage_since(store, NOON), last_used(store)) == ([], {})


def test_new_usage_is_added_to_the_stored_usage(store: Store) -> None:
    for _ in range(3):
        add_usage(store, {OF: Usage(1, 10, 5)})
    assert usage_since(store, NOON) == [UsageTotal("abcd0123", "tickets", Usage(3, 30, 15))]


def test_usage_is_grouped_by_key_and_model_with_the_largest_first(store: Store) -> None:
    add_usage(
        store,
        {
            OF: Usage(1, 10, 5),
            OF._replace(key_id=""): Usage(1, 100, 0),
            OF._replace(model="reviews"): Usage(2, 0, 50),
            OF._replace(hour=NOON + timedelta(hours=1)): Usage(1, 1, 1),
        },
    )
    assert usage_since(store, NOON) == [
        UsageTotal("", "tickets", Usage(1, 100, 0)),
        UsageTotal("abcd0123", "reviews", Usage(2, 0, 50)),
        UsageTotal("abcd0123", "tickets", Usage(2, 11, 6)),
    ]


def test_usage_before_the_start_of_the_range_is_excluded(store: Store) -> None:
    add_usage(store, {OF: Usage(1, 10, 5), OF._replace(hour=NOON - timedelta(hours=1)): Usage(1, 1000, 0)})
    assert usage_since(store, NOON + timedelta(minutes=59)) == [UsageTotal("abcd0123", "tickets", Usage(1, 10, 5))]


def test_daily_usage_covers_the_given_day_and_the_previous_day(store: Store) -> None:
    midnight = midnight_of(NOON)
    hours = [midnight - timedelta(hours=25), midnight - timedelta(hours=1), midnight, NOON]
    add_usage(store, {OF._replace(hour=hour): Usage(1, 10**number, 1) for number, hour in enumerate(hours)})
    add_usage(store, {OF._replace(model="reviews"): Usage(1, 7, 1), OF._replace(key_id="x"): Usage(5)})
    assert usage_by_day(store, midnight) == {
        DayOf(midnight - timedelta(days=1), "abcd0123"): Usage(1, 10, 1),
        DayOf(midnight, "abcd0123"): Usage(3, 1107, 3),
        DayOf(midnight, "x"): Usage(5),
    }


def test_token_counts_above_32_bits_are_supported(store: Store) -> None:
    add_usage(store, {OF: Usage(1, 2**40, 2**40)})
    add_usage(store, {OF: Usage(1, 2**40, 2**40)})
    assert usage_since(store, NOON)[0].usage.tokens_in == 2**41


@pytest.mark.slow
def test_concurrent_usage_updates_are_not_lost(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: add_usage(store, {OF: Usage(1, 2, 3)}), range(64)))
    assert usage_since(store, NOON)[0].usage == Usage(64, 128, 192)


def test_last_used_hour_of_each_key_is_returned(store: Store) -> None:
    later = NOON + timedelta(hours=5)
    add_usage(store, {OF: Usage(1), OF._replace(hour=later): Usage(1), OF._replace(key_id="x"): Usage(1)})
    assert last_used(store) == {"abcd0123": later, "x": NOON}


def test_usage_hours_are_in_utc() -> None:
    india = timezone(timedelta(hours=5, minutes=30))
    assert hour_of(datetime(2026, 1, 2, 17, 45, tzinfo=india)) == NOON
