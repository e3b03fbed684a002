"""Tests that work is cancelled and cleaned up when its client disconnects, before this is reported."""

import asyncio

import pytest

from serving.access.authenticator import Grant, InvalidKeyError, KeyFault
from serving.http.body import ClientGoneError
from serving.http.disconnect import cut_off, while_connected
from serving.http.request_state import RequestState
from tests.serving.keyed import principal


@pytest.fixture
def state() -> RequestState:
    return RequestState("req-1", {})


async def test_handler_completes_if_the_client_stays_connected(state: RequestState) -> None:
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    await while_connected(state, work())
    assert done.is_set()


async def test_error_raised_by_the_handler_is_propagated(state: RequestState) -> None:
    async def work() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await while_connected(state, work())


async def test_handler_is_cancelled_and_cleans_up_when_the_client_disconnects(state: RequestState) -> None:
    cleaned = asyncio.Event()

    async def work() -> None:
        try:
            state.connection.lost.end()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with pytest.raises(ClientGoneError):
        await while_connected(state, work())
    assert cleaned.is_set()


async def test_external_cancellation_of_the_request_task_also_cancels_the_handler(state: RequestState) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(while_connected(state, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_handler_is_cancelled_when_its_key_becomes_invalid(state: RequestState) -> None:
    state.grant = Grant(principal())
    ended = state.grant.ended

    async def work() -> None:
        ended.end(InvalidKeyError(KeyFault.REVOKED, "the key is revoked"))
        await asyncio.sleep(60)

    with pytest.raises(InvalidKeyError, match="revoked"):
        await while_connected(state, work())


async def test_external_cancellation_is_raised_even_if_the_client_also_disconnects(
    state: RequestState,
) -> None:
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(while_connected(state, work()))
    await started.wait()
    state.connection.lost.end()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_disconnect_after_the_handler_completes_does_not_cancel_later_code(state: RequestState) -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    await while_connected(state, work())
    state.connection.lost.end()
    await asyncio.sleep(0.01)
    assert (task := asyncio.current_task()) is not None
    assert task.cancelling() == 0


async def test_forced_disconnect_waits_until_the_connection_is_closed(state: RequestState) -> None:
    def abort() -> None:
        asyncio.get_running_loop().call_soon(state.connection.lost.end)

    state.connection.abort = abort
    async with asyncio.timeout(2):
        await cut_off(state.connection)
    assert state.connection.lost.ended
