"""Tests the server's own request: separate from client requests, low-priority, and cancelled by swaps."""

import asyncio
from contextlib import suppress

import pytest

from serving.admission.admission import Admission
from serving.admission.background_slot import BackgroundSlotEndedError
from tests.serving.admission.opened import admitted, drained, open_admission, run_until, settle
from tests.serving.service import closed


async def ask_in_background(admission: Admission, end: asyncio.Event, patience_s: float = 60.0) -> str:
    """Send one of the server's own requests and return how it ended."""
    try:
        async with admission.background_slot.take(patience_s):
            await end.wait()
    except BackgroundSlotEndedError:
        return "cut off"
    return "answered"


async def test_background_request_is_not_counted_among_the_running_requests() -> None:
    admission = open_admission(max_running=1)
    async with admission.background_slot.take(1):
        assert admission.running == 0
        async with admitted(admission):
            assert admission.running == 1
    assert admission.running == 0


async def test_background_request_waits_until_no_client_requests_run() -> None:
    admission, last, end = open_admission(), asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(run_until(admission, end))
    second = asyncio.create_task(run_until(admission, last))
    await settle()
    question = asyncio.create_task(ask_in_background(admission, asyncio.Event()))
    end.set()
    await first
    await settle()
    assert not admission.background_slot.taken
    last.set()
    await second
    await settle()
    assert admission.background_slot.taken
    question.cancel()
    await asyncio.wait([question])


async def test_background_request_runs_alongside_client_requests_after_its_maximum_wait() -> None:
    admission, end = open_admission(), asyncio.Event()
    async with admitted(admission):
        question = asyncio.create_task(ask_in_background(admission, end, patience_s=0.01))
        await settle()
        assert not admission.background_slot.taken
        end.set()
        assert await question == "answered"


async def test_background_request_waits_while_admission_is_closed() -> None:
    admission, end = open_admission(), asyncio.Event()
    end.set()
    async with closed(admission):
        question = asyncio.create_task(ask_in_background(admission, end, patience_s=0.0))
        await asyncio.sleep(0.02)
        assert not question.done()
    assert await question == "answered"


async def test_background_request_waits_if_there_is_no_engine() -> None:
    admission, end = Admission(max_running=1, max_tokens=100, max_queued=1, queue_timeout_s=1), asyncio.Event()
    end.set()
    question = asyncio.create_task(ask_in_background(admission, end, patience_s=0.0))
    await asyncio.sleep(0.02)
    assert not question.done()
    admission.available()
    assert await question == "answered"


async def test_swap_cancels_the_background_request_and_waits_for_it_to_end() -> None:
    admission, ended = open_admission(), asyncio.Event()

    async def ask() -> None:
        with suppress(BackgroundSlotEndedError):
            async with admission.background_slot.take(60):
                try:
                    await asyncio.sleep(60)
                finally:
                    await ended.wait()  # the connection to the engine takes a moment to close

    question = asyncio.create_task(ask())
    await settle()
    async with closed(admission):
        gone = asyncio.create_task(drained(admission, 5))
        await settle()
        assert not gone.done()
        ended.set()
        await gone
    await question


async def test_background_request_is_cancelled_when_the_engine_stops() -> None:
    admission = open_admission()
    question = asyncio.create_task(ask_in_background(admission, asyncio.Event()))
    await settle()
    admission.unavailable("the engine failed")
    admission.unavailable("the engine is starting")
    assert await question == "cut off"
    async with closed(admission):
        await drained(admission, 0.1)


async def test_late_cancellation_has_no_effect_on_a_request_that_just_ended() -> None:
    """A late cancellation must not affect what the task does next."""
    for turns in range(6):
        admission, end = open_admission(), asyncio.Event()

        async def ask_and_go_on(admission: Admission = admission, end: asyncio.Event = end) -> str:
            how = await ask_in_background(admission, end)
            await asyncio.sleep(0.001)
            return how

        question = asyncio.create_task(ask_and_go_on())
        await settle()
        end.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with closed(admission):
            await drained(admission, 0.1)
        assert await question in ("answered", "cut off")


async def test_timeout_within_a_background_request_is_not_mistaken_for_cancellation() -> None:
    admission = open_admission()
    with pytest.raises(TimeoutError):
        async with admission.background_slot.take(1), asyncio.timeout(0.001):
            await asyncio.sleep(1)
    async with admission.background_slot.take(1):
        pass


async def test_background_requests_run_one_at_a_time() -> None:
    admission = open_admission()
    async with admission.background_slot.take(1):
        with pytest.raises(RuntimeError, match="already"):
            async with admission.background_slot.take(1):
                pass
        assert admission.background_slot.taken
