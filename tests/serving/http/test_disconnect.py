"""Work ends when its client leaves, and gives back what it holds before that is told."""

import asyncio

import pytest
from starlette.types import Message

from serving.http.disconnect import while_connected
from serving.protocols.request import ClientGoneError


class Connection:
    """A connection that the test closes."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def receive(self) -> Message:
        await self.closed.wait()
        return {"type": "http.disconnect"}


async def test_work_that_ends_is_ended_by_nobody() -> None:
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    await while_connected(Connection().receive, work())
    assert done.is_set()


async def test_the_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await while_connected(Connection().receive, work())


async def test_a_client_that_leaves_ends_the_work_and_waits_for_its_cleaning_up() -> None:
    connection, cleaned = Connection(), asyncio.Event()

    async def work() -> None:
        try:
            connection.closed.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with pytest.raises(ClientGoneError):
        await while_connected(connection.receive, work())
    assert cleaned.is_set()


async def test_cancelling_it_from_outside_ends_the_work() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(while_connected(Connection().receive, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
