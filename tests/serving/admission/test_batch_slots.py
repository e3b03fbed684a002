"""Tests that batch requests use only the capacity that clients leave."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serving.admission import admission as batch_slots
from serving.admission.admission import Admission, InterruptedRequestError
from serving.admission.errors import QueueTimeoutError, TooManyTokensError
from serving.admission.tenant import NO_KEY, Tenant
from serving.one_shot_event import OneShotEvent
from tests.serving.admission.opened import admitted, open_admission, settle
from tests.serving.service import closed


class Batched:
    """A request in a batch that runs until it is ended or interrupted."""

    def __init__(self, admission: Admission, tokens: int = 1) -> None:
        self.interruption, self._end = OneShotEvent(), asyncio.Event()
        self.began = False
        self.interruption.listen(self._end.set)
        self.task = asyncio.create_task(self._run(admission, tokens))

    async def _run(self, admission: Admission, tokens: int) -> None:
        async with admitted(admission, tokens, Tenant("alice", 1, self.interruption)):
            self.began = True
            await self._end.wait()

    @property
    def interrupted(self) -> bool:
        return self.interruption.ended

    async def end(self) -> None:
        self._end.set()
        await self.task


@asynccontextmanager
async def batched(admission: Admission, count: int, tokens: int = 1) -> AsyncIterator[list[Batched]]:
    """Run batch requests while the context is active."""
    requests = [Batched(admission, tokens) for _ in range(count)]
    await settle()
    try:
        yield requests
    finally:
        for request in requests:
            request.task.cancel()
        await asyncio.gather(*(request.task for request in requests), return_exceptions=True)


def begun(requests: list[Batched]) -> list[bool]:
    return [request.began for request in requests]


async def test_batch_requests_leave_a_quarter_of_the_capacity_free_for_clients() -> None:
    admission = open_admission(max_running=8)
    async with batched(admission, 8) as requests:
        assert begun(requests) == [True] * 6 + [False] * 2
        assert (admission.running, admission.queued) == (0, 0)
        await requests[0].end()
        await settle()
        assert begun(requests) == [True] * 7 + [False]


async def test_client_requests_run_immediately_and_interrupt_the_newest_batch_requests() -> None:
    admission = open_admission(max_running=4)
    async with batched(admission, 3) as requests, admitted(admission):
        assert not any(request.interrupted for request in requests)
        async with admitted(admission), admitted(admission):
            assert [request.interrupted for request in requests] == [False, True, True]
            assert isinstance(requests[1].interruption.error, InterruptedRequestError)


async def test_batch_requests_wait_while_client_requests_are_queued() -> None:
    admission = open_admission(max_running=1)
    async with admitted(admission):
        queued = asyncio.create_task(admission.enter(1, Tenant("bob")))
        await settle()
        async with batched(admission, 1) as (request,):
            assert not request.began
            admission.leave(1)
            await queued
            assert not request.began
            admission.leave(1)
            await settle()
            assert request.began
            await admission.enter(1, NO_KEY)  # for the end of the context above


async def test_batch_requests_are_interrupted_when_client_requests_need_their_tokens() -> None:
    admission = open_admission(max_running=8, max_tokens=100)
    async with batched(admission, 3, tokens=40) as requests:
        assert begun(requests) == [True, True, False]
        async with admitted(admission, 50):
            assert [request.interrupted for request in requests] == [False, True, False]


async def test_batch_request_that_exceeds_the_token_capacity_is_rejected() -> None:
    admission = open_admission(max_tokens=10)
    with pytest.raises(TooManyTokensError):
        await admission.enter(11, Tenant("alice", 1, OneShotEvent()))


async def test_number_of_running_batch_requests_is_limited_by_the_setting() -> None:
    admission = Admission(max_running=100, max_tokens=100, max_queued=1, queue_timeout_s=1, max_batched=2)
    admission.available()
    async with batched(admission, 3) as requests:
        assert begun(requests) == [True, True, False]


async def test_closing_admission_for_a_swap_interrupts_running_batch_requests_and_delays_new_ones() -> None:
    admission = open_admission()
    async with batched(admission, 1) as (first,):
        async with closed(admission):
            assert first.interrupted
            await first.task
            async with batched(admission, 1) as (second,):
                assert not second.began
                admission.available()
                await settle()
                assert not second.began  # the change has not ended
        async with batched(admission, 1) as (third,):
            assert third.began


async def test_batch_requests_wait_while_the_engine_starts() -> None:
    admission = open_admission()
    admission.unavailable("the engine is starting")
    async with batched(admission, 1) as (request,):
        assert not request.began
        assert admission.batch_slots.wanted
        admission.available()
        await settle()
        assert request.began
        assert not admission.batch_slots.wanted


async def test_batch_request_times_out_after_the_maximum_wait_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_slots, "MAX_WAIT_S", 0.01)
    admission = open_admission(max_running=1)
    async with admitted(admission):
        with pytest.raises(QueueTimeoutError):
            await admission.enter(1, Tenant("alice", 1, OneShotEvent()))
        assert not admission.batch_slots.busy


@pytest.mark.parametrize("ticks", [0, 1, 2])
async def test_cancelled_batch_request_occupies_no_slot(ticks: int) -> None:
    admission = open_admission(max_running=1)
    await admission.enter(1, NO_KEY)
    waiting = asyncio.create_task(admission.enter(1, Tenant("alice", 1, OneShotEvent())))
    await settle()
    admission.leave(1)  # gives the slot, but the task has not run yet
    for _ in range(ticks):
        await asyncio.sleep(0)
    if waiting.done():
        admission.leave(1, Tenant("alice", 1, OneShotEvent()))
        return
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not admission.batch_slots.busy


async def test_next_batch_request_runs_if_the_previous_one_is_cancelled_before_using_its_slot() -> None:
    admission = open_admission(max_running=1)
    await admission.enter(1, NO_KEY)
    async with batched(admission, 2) as (first, second):
        admission.leave(1)  # gives the first its slot, but its task has not run yet
        first.task.cancel()
        await settle()
        assert second.began


async def test_next_batch_request_runs_when_the_larger_request_ahead_of_it_is_cancelled() -> None:
    admission = open_admission(max_running=8, max_tokens=100)
    async with admitted(admission, 50), batched(admission, 1, tokens=60) as (large,), batched(admission, 1) as (small,):
        assert begun([large, small]) == [False, False]
        large.task.cancel()
        await settle()
        assert small.began
