"""Tests that usage is counted at once and written periodically, and that store failures do not distort it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.access import usage_meter
from serving.access.usage import Usage, UsageTotal, usage_since
from serving.access.usage_meter import UsageMeter
from tests.serving.access.conftest import Clock


@pytest.fixture
def meter(store: Store, clock: Clock) -> UsageMeter:
    return UsageMeter(store, now=clock.now)


def test_no_usage_is_written_before_a_flush(meter: UsageMeter, store: Store, clock: Clock) -> None:
    meter.add("abcd0123", "tickets", tokens_in=10, tokens_out=5)
    assert usage_since(store, clock.at) == []
    meter.flush()
    assert usage_since(store, clock.at) == [UsageTotal("abcd0123", "tickets", Usage(1, 10, 5))]


def test_second_usage_flush_adds_nothing(meter: UsageMeter, store: Store, clock: Clock) -> None:
    meter.add("abcd0123", "tickets", tokens_in=10, tokens_out=5)
    meter.flush()
    meter.flush()
    assert usage_since(store, clock.at)[0].usage == Usage(1, 10, 5)


def test_usage_of_requests_without_a_key_is_counted(meter: UsageMeter, store: Store, clock: Clock) -> None:
    meter.add(None, "tickets", tokens_in=1, tokens_out=1)
    meter.flush()
    assert usage_since(store, clock.at)[0].key_id == ""


def test_request_is_counted_in_the_hour_in_which_it_ended(meter: UsageMeter, store: Store, clock: Clock) -> None:
    meter.add("a", "tickets", tokens_in=1, tokens_out=1)
    clock.forward(hours=1)
    meter.add("a", "tickets", tokens_in=2, tokens_out=2)
    meter.flush()
    assert usage_since(store, clock.at)[0].usage == Usage(1, 2, 2)


def test_usage_is_kept_for_the_next_flush_if_the_store_fails(
    meter: UsageMeter, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        meter.add("a", "tickets", tokens_in=1, tokens_out=1)  # while it is being written
        raise OperationalError("INSERT", {}, OSError("disk full"))

    meter.add("a", "tickets", tokens_in=10, tokens_out=5)
    with monkeypatch.context() as patch:
        patch.setattr(usage_meter, "add_usage", fail)
        with pytest.raises(OperationalError):
            meter.flush()
    meter.flush()
    assert usage_since(store, clock.at)[0].usage == Usage(2, 11, 6)


def test_no_usage_is_lost_if_several_threads_add_usage_concurrently(
    meter: UsageMeter, store: Store, clock: Clock
) -> None:
    def count(number: int) -> None:
        meter.add("a", "tickets", tokens_in=1, tokens_out=2)
        if number % 50 == 0:
            meter.flush()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(400)))
    meter.flush()
    assert usage_since(store, clock.at)[0].usage == Usage(400, 400, 800)
