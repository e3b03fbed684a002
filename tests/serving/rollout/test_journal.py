"""Tests that the swap journal is ordered, complete and never blocking."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.rollout import journal as module
from serving.rollout.journal import Journal
from serving.rollout.served import Began, Ended, begin_serving, served_spans
from svc.store.desired import Desired
from svc.store.swaps import SwapOutcome, SwapRecord, SwapResult, begin_swap, end_swap, find_swap
from tests.serving.versions import NAME, target

DESIRED = Desired(target(2), target(1), 1)


async def ended(store: Store) -> SwapRecord:
    async with asyncio.timeout(3):
        while not (swap := find_swap(store, NAME)) or swap.result is None:
            await asyncio.sleep(0.005)
    return swap


async def test_swap_steps_and_result_are_written_in_order(store: Store) -> None:
    journal = Journal(store)
    swap_id = journal.begin(DESIRED)
    for number in range(10):
        journal.step(swap_id, str(number))
    result = SwapResult(SwapOutcome.REFUSED, "why", 1.5, 2, 3)
    journal.end(swap_id, result)
    swap = await ended(store)
    assert swap.steps == tuple(str(number) for number in range(10))
    assert swap.result == result


async def test_recording_a_swap_step_does_not_wait_for_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(store)
    swap_id = journal.begin(DESIRED)
    returned, in_time = threading.Event(), list[bool]()
    monkeypatch.setattr(module, "add_step", lambda *_: in_time.append(returned.wait(3)))
    journal.step(swap_id, "slow")
    returned.set()
    journal.end(swap_id, SwapResult(SwapOutcome.SUCCEEDED))
    await ended(store)
    assert in_time == [True]


async def test_failed_journal_write_is_retried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "end_swap", _fails_once(end_swap))
    journal = Journal(store)
    journal.end(journal.begin(DESIRED), SwapResult(SwapOutcome.SUCCEEDED))
    assert (await ended(store)).result == SwapResult(SwapOutcome.SUCCEEDED)


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_MAX_PAUSE_S", 0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_pauses")
async def test_writing_a_swap_result_is_retried_even_after_an_os_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "end_swap", _fails(end_swap, 3 * module._ATTEMPTS, OSError("disk full")))
    journal = Journal(store)
    journal.end(journal.begin(DESIRED), SwapResult(SwapOutcome.SUCCEEDED))
    assert (await ended(store)).result == SwapResult(SwapOutcome.SUCCEEDED)
    journal.close()


@pytest.mark.usefixtures("quick_pauses")
async def test_swap_result_that_is_not_yet_written_is_available_in_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(store)
    with monkeypatch.context() as broken:
        broken.setattr(module, "end_swap", _fails(end_swap, 2**30, LOCKED))
        swap_id = journal.begin(DESIRED)
        journal.end(swap_id, SwapResult(SwapOutcome.FAILED, "why"))
        assert journal.unwritten == {swap_id: SwapResult(SwapOutcome.FAILED, "why")}
        # Other swaps begin meanwhile.
        assert journal.begin(Desired(target(3), target(1), 2)) != swap_id
    await asyncio.to_thread(journal.close)
    assert journal.unwritten == {}


@pytest.mark.usefixtures("quick_pauses")
async def test_swap_step_that_cannot_be_written_is_dropped_but_the_result_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "add_step", _fails(lambda *_: None, module._ATTEMPTS, LOCKED))
    journal = Journal(store)
    swap_id = journal.begin(DESIRED)
    journal.step(swap_id, "lost")
    journal.end(swap_id, SwapResult(SwapOutcome.SUCCEEDED))
    assert (await ended(store)).steps == ()


async def test_closing_the_journal_writes_pending_records(store: Store) -> None:
    journal = Journal(store)
    swap_id = journal.begin(DESIRED)
    for number in range(10):
        journal.step(swap_id, str(number))
    journal.end(swap_id, SwapResult(SwapOutcome.SUCCEEDED))
    journal.close()
    swap = find_swap(store, NAME)
    assert swap is not None and swap.result is not None and len(swap.steps) == 10


@pytest.mark.usefixtures("quick_pauses")
async def test_closing_the_journal_gives_up_if_the_store_accepts_no_writes(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "end_swap", _fails(end_swap, 2**30, LOCKED))
    others = set(threading.enumerate())
    journal = Journal(store)
    for generation in (1, 2):
        swap_id = journal.begin(Desired(target(2), target(1), generation))
        journal.end(swap_id, SwapResult(SwapOutcome.SUCCEEDED))
    started = time.monotonic()
    journal.close(timeout_s=0.1)
    assert time.monotonic() - started < 1
    assert "could not write the results of 2 swaps" in caplog.text
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith("journal"):
            thread.join(1)
            assert not thread.is_alive()  # otherwise the process could not exit


async def test_swap_does_not_begin_if_the_store_accepts_no_writes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "begin_swap", _fails_once(begin_swap))
    with pytest.raises(OperationalError):
        Journal(store).begin(DESIRED)


LOCKED = OperationalError("insert", {}, Exception("database is locked"))


def _fails_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return _fails(function, 1, LOCKED)


def _fails(function: Callable[..., Any], times: int, error: Exception) -> Callable[..., Any]:
    failures = times

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise error
        return function(*arguments, **options)

    return fail


async def test_served_versions_are_recorded_in_order_after_a_store_outage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "begin_serving", _fails_once(begin_serving))
    journal = Journal(store)
    journal.serves(Desired(target(1), None, 1), Began.START)
    journal.serves(DESIRED, Began.SWAP)
    journal.stopped(NAME)
    await asyncio.to_thread(journal.close)
    spans = served_spans(store, NAME)
    assert [(span.target, span.began_by, span.ended_by) for span in spans] == [
        (target(1), Began.START, Ended.SWAP),
        (target(2), Began.SWAP, Ended.STOP),
    ]
    assert spans[0].ended_at == spans[1].began_at
