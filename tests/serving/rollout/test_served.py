"""Tests that it is recorded when each version was served, even if a server died."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.rollout.served import Began, Ended, ServedSpan, begin_serving, end_serving, served_spans
from svc.store.desired import Desired
from svc.store.leases import remove_server, report_server
from svc.version import Format, Target, VersionId

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
ONE, TWO = (Desired(Target(VersionId("tickets", number), Format.GPTQ), None, generation=number) for number in (1, 2))


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def minute(number: int) -> datetime:
    return NOON + timedelta(minutes=number)


def test_new_store_has_no_serving_intervals(store: Store) -> None:
    end_serving(store, "tickets")
    assert served_spans(store, "tickets") == []


def test_serving_interval_lasts_from_start_to_stop(store: Store) -> None:
    begin_serving(store, ONE, Began.START, at=minute(0))
    end_serving(store, "tickets", at=minute(5))
    assert served_spans(store, "tickets") == [ServedSpan(ONE.target, 1, minute(0), Began.START, minute(5), Ended.STOP)]


def test_swap_ends_one_serving_interval_and_begins_another(store: Store) -> None:
    begin_serving(store, ONE, Began.START, at=minute(0))
    begin_serving(store, TWO, Began.SWAP, at=minute(1))
    assert served_spans(store, "tickets") == [
        ServedSpan(ONE.target, 1, minute(0), Began.START, minute(1), Ended.SWAP),
        ServedSpan(TWO.target, 2, minute(1), Began.SWAP, None, None),
    ]


def test_swap_to_the_version_already_served_does_not_start_a_new_serving_period(store: Store) -> None:
    begin_serving(store, ONE, Began.START, at=minute(0))
    begin_serving(store, ONE, Began.SWAP, at=minute(1))
    assert served_spans(store, "tickets") == [ServedSpan(ONE.target, 1, minute(0), Began.START, None, None)]


@pytest.mark.parametrize("began_by", [Began.START, Began.ADOPTED])
def test_serving_interval_of_a_crashed_server_ends_when_the_server_restarts(store: Store, began_by: Began) -> None:
    begin_serving(store, ONE, Began.START, at=minute(0))
    begin_serving(store, ONE, began_by, at=minute(9))
    assert served_spans(store, "tickets") == [
        ServedSpan(ONE.target, 1, minute(0), Began.START, minute(9), Ended.LOST),
        ServedSpan(ONE.target, 1, minute(9), began_by, None, None),
    ]


def test_serving_intervals_of_different_models_are_independent(store: Store) -> None:
    other = Desired(Target(VersionId("reviews", 1), Format.MERGED), None, 1)
    begin_serving(store, ONE, Began.START, at=minute(0))
    begin_serving(store, other, Began.START, at=minute(1))
    end_serving(store, "tickets", at=minute(2))
    assert [span.ended_at for span in served_spans(store, "reviews")] == [None]


def test_served_versions_are_recorded_separately_for_each_running_server(postgresql_store: Store) -> None:
    for server in ("a", "b"):
        report_server(postgresql_store, server, f"{server}:8000", [])
        begin_serving(postgresql_store, ONE, Began.START, at=minute(0), server=server)
    begin_serving(postgresql_store, TWO, Began.SWAP, at=minute(1), server="a")
    end_serving(postgresql_store, "tickets", at=minute(2), server="a")
    spans = [(span.server, span.ended_by) for span in served_spans(postgresql_store, "tickets")]
    assert spans == [("a", Ended.SWAP), ("b", None), ("a", Ended.STOP)]


def test_starting_a_server_ends_the_serving_intervals_of_dead_servers(postgresql_store: Store) -> None:
    begin_serving(postgresql_store, ONE, Began.START, at=minute(0), server="died")
    report_server(postgresql_store, "a", "a:8000", [])
    begin_serving(postgresql_store, ONE, Began.START, at=minute(5), server="a")
    remove_server(postgresql_store, "a")
    first, second = served_spans(postgresql_store, "tickets")
    assert (first.server, first.ended_at, first.ended_by) == ("died", minute(5), Ended.LOST)
    assert (second.server, second.ended_at, second.ended_by) == ("a", None, Ended.LOST)
