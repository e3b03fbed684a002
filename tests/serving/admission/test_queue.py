"""Tests waiting requests: their order, their limits, and that requests that leave the queue leave no trace."""

import asyncio
import time

import pytest

from serving.admission.admission import Admission
from serving.admission.errors import (
    EngineUnavailableError,
    OverloadedError,
    QueueOverflowError,
    QueueTimeoutError,
)
from serving.admission.tenant import Tenant
from serving.one_shot_event import OneShotEvent
from tests.serving.admission.opened import admit_once, admitted, open_admission, run_until, settle
from tests.serving.service import closed


async def test_peak_queue_length_is_retained_after_the_queue_empties() -> None:
    admission = open_admission()
    async with closed(admission):
        waiting = [asyncio.create_task(run_until(admission, asyncio.Event())) for _ in range(3)]
        await settle()
        for task in waiting:
            task.cancel()
        await settle()
        assert (admission.queued, admission.queue.most) == (0, 3)
    async with closed(admission):
        assert admission.queue.most == 0


async def test_queued_requests_are_admitted_in_order_when_admission_opens() -> None:
    admission, entered = open_admission(), list[int]()

    async def client(number: int) -> None:
        async with admitted(admission):
            entered.append(number)

    async with closed(admission):
        tasks = [asyncio.create_task(client(number)) for number in range(5)]
        await settle()
        assert (admission.queued, entered) == (5, [])
    await asyncio.gather(*tasks)
    assert entered == [0, 1, 2, 3, 4]


async def test_request_is_rejected_if_the_queue_is_full() -> None:
    admission, end = open_admission(max_queued=1), asyncio.Event()
    async with closed(admission):
        task = asyncio.create_task(run_until(admission, end))
        await settle()
        with pytest.raises(QueueOverflowError):
            async with admitted(admission):
                pass
    end.set()
    await task


async def test_queued_request_waits_no_longer_than_its_timeout() -> None:
    admission = open_admission(queue_timeout_s=0.01)
    async with closed(admission):
        with pytest.raises(QueueTimeoutError):
            async with admitted(admission):
                pass
        assert admission.queued == 0


async def test_every_queued_request_eventually_runs_despite_the_concurrency_limit() -> None:
    admission, entered = open_admission(max_running=2), list[int]()

    async def client(number: int) -> None:
        async with admitted(admission):
            entered.append(number)
            assert admission.running <= 2
            await asyncio.sleep(0)

    async with closed(admission):
        tasks = [asyncio.create_task(client(number)) for number in range(7)]
        await settle()
    await asyncio.gather(*tasks)
    assert entered == list(range(7))


async def test_request_cancelled_at_the_moment_of_its_admission_occupies_no_slot() -> None:
    admission = open_admission()
    async with closed(admission):
        task = asyncio.create_task(run_until(admission, asyncio.Event()))
        await settle()
    task.cancel()
    await asyncio.wait([task])
    assert (admission.running, admission.queued) == (0, 0)


async def test_requests_wait_while_an_engine_starts_on_demand() -> None:
    admission = open_admission()
    admission.sleep()
    admission.unavailable(None)
    assert admission.unavailable_reason is None
    waiting = asyncio.create_task(admit_once(admission))
    async with asyncio.timeout(1):
        await admission.queue.wanted()
    admission.available()
    await waiting
    admission.wake()
    admission.unavailable("the engine has failed")
    with pytest.raises(EngineUnavailableError):
        await admit_once(admission)


async def test_requests_are_rejected_if_the_on_demand_engine_fails_to_start() -> None:
    admission = open_admission()
    admission.sleep()
    admission.unavailable(None)
    waiting = asyncio.create_task(admit_once(admission))
    await admission.queue.wanted()
    admission.unavailable("the engine has failed")
    admission.wake()
    with pytest.raises(EngineUnavailableError, match="has failed"):
        await waiting


@pytest.mark.slow
async def test_request_waits_up_to_the_wake_timeout_for_an_engine_to_start() -> None:
    admission = Admission(max_running=1, max_tokens=9, max_queued=9, queue_timeout_s=0.01, wake_timeout_s=0.2)
    admission.sleep()
    admission.unavailable(None)
    began = time.monotonic()
    with pytest.raises(QueueTimeoutError, match=r"0\.2 s for an engine"):
        await admit_once(admission)
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("cancelled", [True, False])
async def test_smaller_request_is_admitted_when_a_larger_one_ahead_of_it_stops_waiting(cancelled: bool) -> None:
    admission, alice = open_admission(max_tokens=100, queue_timeout_s=0.05), Tenant("alice")
    async with admitted(admission, 50):
        large = asyncio.create_task(admission.enter(60, alice))
        await asyncio.sleep(0.03)
        small = asyncio.create_task(admission.enter(1, alice))  # times out later than the larger one
        await settle()
        assert admission.queued == 2
        if cancelled:
            large.cancel()
        with pytest.raises((asyncio.CancelledError, OverloadedError)):
            await large
        await small
        admission.leave(1)


async def test_batch_request_runs_when_the_queued_request_that_it_yielded_to_is_cancelled() -> None:
    admission = open_admission(max_tokens=100)
    async with admitted(admission, 50):
        queued = asyncio.create_task(admission.enter(60, Tenant("alice")))
        await settle()
        batch = asyncio.create_task(admission.enter(1, Tenant("bob", 1, OneShotEvent())))
        await settle()
        assert not batch.done()
        queued.cancel()
        await settle()
        assert batch.done()
