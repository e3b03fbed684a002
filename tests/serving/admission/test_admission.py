"""Tests which requests run or are rejected, with exact counts, including during an engine change."""

import asyncio
import time
from contextlib import suppress

import pytest

from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError, OverloadedError, QueueTimeoutError, TooManyTokensError
from serving.admission.tenant import NO_KEY, Tenant
from tests.serving.admission.opened import admitted, open_admission, run_until, settle
from tests.serving.service import closed


async def test_running_request_is_counted_until_it_ends() -> None:
    admission = open_admission()
    async with admitted(admission):
        assert admission.running == 1
    assert admission.running == 0


async def test_slot_is_released_when_a_request_fails() -> None:
    admission = open_admission()
    with suppress(ValueError):
        async with admitted(admission):
            raise ValueError
    assert admission.running == 0


async def test_request_is_rejected_when_all_slots_are_taken() -> None:
    admission = open_admission(max_running=1)
    async with admitted(admission):
        with pytest.raises(OverloadedError):
            async with admitted(admission):
                pass
    assert admission.running == 0


async def test_admission_reopens_when_a_swap_fails() -> None:
    admission = open_admission()
    with suppress(ValueError):
        async with closed(admission):
            raise ValueError
    async with admitted(admission):
        assert admission.running == 1


async def test_only_one_swap_at_a_time_can_close_admission() -> None:
    admission = open_admission()
    async with closed(admission):
        with pytest.raises(RuntimeError):
            async with closed(admission):
                pass


async def test_requests_do_not_wait_for_a_swap_if_another_engine_accepts_them() -> None:
    admission = open_admission()
    async with admission.changing(), admitted(admission):
        assert admission.running == 1
    assert admission.closed_s is None


async def test_requests_wait_if_the_last_serving_engine_is_lost_during_a_swap() -> None:
    admission, end = open_admission(), asyncio.Event()
    end.set()
    async with admission.changing():
        admission.unavailable("the engine has failed")
        task = asyncio.create_task(run_until(admission, end))
        await settle()
        assert admission.queued == 1
        admission.available()
        await task
    assert admission.closed_s is not None


async def test_requests_without_a_ready_engine_wait_only_during_a_swap() -> None:
    admission = open_admission()
    admission.unavailable(None)
    with pytest.raises(EngineUnavailableError, match="being changed"):
        async with admitted(admission):
            pass


async def test_requests_are_rejected_with_the_reason_if_there_is_no_engine() -> None:
    admission = Admission(max_running=1, max_tokens=100, max_queued=1, queue_timeout_s=1)
    with pytest.raises(EngineUnavailableError, match="starting"):
        async with admitted(admission):
            pass


async def test_queued_requests_are_kept_when_a_swap_restarts_the_engine() -> None:
    admission, end = open_admission(), asyncio.Event()
    end.set()
    async with admission.changing():
        admission.unavailable(None)
        task = asyncio.create_task(run_until(admission, end))
        await settle()
        admission.unavailable("the engine is starting")
        await settle()
        assert admission.queued == 1
        admission.available()
    await task


async def test_queued_requests_are_rejected_when_a_swap_ends_without_an_engine() -> None:
    admission = open_admission()
    async with admission.changing():
        admission.unavailable(None)
        task = asyncio.create_task(run_until(admission, asyncio.Event()))
        await settle()
        admission.unavailable("the engine failed")
    with pytest.raises(EngineUnavailableError):
        await task
    assert (admission.running, admission.queued) == (0, 0)


class TestTokens:
    """Tests that a request counts by the maximum number of tokens in its answers."""

    async def test_request_runs_if_it_fits_within_the_remaining_token_capacity(self) -> None:
        admission = open_admission(max_tokens=100)
        async with admitted(admission, 60), admitted(admission, 40):
            assert admission.running == 2

    async def test_request_is_rejected_if_it_exceeds_the_remaining_token_capacity(self) -> None:
        admission = open_admission(max_tokens=100)
        async with admitted(admission, 60):
            with pytest.raises(OverloadedError, match="up to 60 tokens"):
                async with admitted(admission, 41):
                    pass

    async def test_reserved_tokens_are_released_when_a_request_ends(self) -> None:
        admission = open_admission(max_tokens=100)
        for _ in range(3):
            async with admitted(admission, 100):
                assert admission.running == 1

    async def test_request_that_exceeds_the_total_token_capacity_is_rejected(self) -> None:
        with pytest.raises(TooManyTokensError, match="101"):
            async with admitted(open_admission(max_tokens=100), 101):
                pass

    async def test_queued_requests_run_as_tokens_are_released(self) -> None:
        admission, end, began = open_admission(max_tokens=100), asyncio.Event(), list[int]()

        async def run(tokens: int) -> None:
            async with admitted(admission, tokens):
                began.append(tokens)
                await end.wait()

        async with closed(admission):
            tasks = [asyncio.create_task(run(tokens)) for tokens in (70, 60, 20)]
            await settle()
        await settle()
        assert began == [70]  # in arrival order: 20 would fit, and 60 might then never run
        end.set()
        await asyncio.gather(*tasks)
        assert began == [70, 60, 20]


async def test_idle_time_is_measured_from_the_end_of_the_last_request() -> None:
    admission = open_admission()
    async with admitted(admission):
        await asyncio.sleep(0.05)
        assert admission.idle_s == 0
    assert admission.idle_s < 0.04
    await asyncio.sleep(0.05)
    assert admission.idle_s >= 0.05


async def test_idle_time_is_measured_from_the_moment_an_engine_becomes_ready() -> None:
    """Otherwise, a model that loaded for longer than `idle_s`, or was promoted while idle, would stop immediately."""
    admission = open_admission()
    admission.unavailable("the engine is starting")
    await asyncio.sleep(0.05)
    admission.available()
    assert admission.idle_s < 0.04


async def test_admitted_request_is_requeued_if_a_swap_begins_before_it_runs() -> None:
    """The request's own task, which would send it to an engine, runs one event-loop turn after the swap begins."""
    admission, end, order = open_admission(max_running=3), asyncio.Event(), list[int]()

    async def request(number: int) -> None:
        async with admitted(admission):
            assert not admission._closed
            order.append(number)
            await end.wait()

    async with closed(admission):
        waiting = [asyncio.create_task(request(number)) for number in range(3)]
        await settle()
    assert (admission.running, admission.queued) == (3, 0)  # places are given, but their tasks have not run yet
    async with closed(admission):
        late = asyncio.create_task(request(3))
        await settle()
        assert (admission.running, admission.queued, order) == (0, 4, [])
    end.set()
    await asyncio.gather(*waiting, late)
    assert order == [0, 1, 2, 3]
    assert (admission.running, admission.queued) == (0, 0)


async def test_requeued_request_is_not_charged_twice_and_keeps_its_queue_position() -> None:
    admission, order = open_admission(max_running=1), list[str]()

    async def request(name: str, tenant: Tenant) -> None:
        async with admitted(admission, 10, tenant):
            order.append(name)

    async with closed(admission):
        waiting = [
            asyncio.create_task(request(name, tenant))
            for name, tenant in (("a1", Tenant("a")), ("b1", Tenant("b")), ("a2", Tenant("a")), ("b2", Tenant("b")))
        ]
        await settle()
    async with closed(admission):  # a1 had been given its place
        await settle()
        assert admission.queued == 4
    await asyncio.gather(*waiting)
    assert order == ["a1", "b1", "a2", "b2"]


@pytest.mark.slow
async def test_total_wait_of_a_requeued_request_stays_within_the_timeout() -> None:
    admission, began = open_admission(queue_timeout_s=0.2), time.monotonic()

    async def request() -> None:
        async with admitted(admission):
            pass

    async with closed(admission):
        asking = asyncio.create_task(request())
        await asyncio.sleep(0.1)
    async with closed(admission):
        with pytest.raises(QueueTimeoutError, match=r"waiting 0\.2 s"):
            await asking
        assert 0.15 < time.monotonic() - began < 0.29
    assert (admission.running, admission.queued) == (0, 0)


async def test_requeued_request_is_fully_cleaned_up_when_its_client_disconnects() -> None:
    admission = open_admission()
    async with closed(admission):
        asking = asyncio.create_task(run_until(admission, asyncio.Event()))
        await settle()
    async with closed(admission):
        await settle()
        asking.cancel()
        await asyncio.wait([asking])
        assert (admission.running, admission.queued) == (0, 0)


async def test_model_is_not_idle_while_a_request_is_being_prepared() -> None:
    admission = open_admission()
    await asyncio.sleep(0.05)
    with admission.preparing():
        assert (admission.idle_s, admission.queued) == (0, 1)
    assert admission.idle_s < 0.04
    assert admission.queued == 0


async def test_keyless_request_that_has_already_waited_for_an_adapter_may_also_wait_for_a_slot() -> None:
    admission = open_admission(max_running=1)
    async with admitted(admission):
        waiting = asyncio.create_task(admission.enter(1, NO_KEY, may_wait=True))
        await settle()
        assert admission.queued == 1
    await waiting
    admission.leave(1)
    assert admission.running == 0
