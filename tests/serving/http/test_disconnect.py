"""Work ends when its client leaves, and gives back what it holds before that is told."""

import asyncio

import pytest
from starlette.types import Message, Scope

from serving.http.body import ClientGoneError
from serving.http.connections import LOST
from serving.http.disconnect import while_connected
from svc.access.authenticator import InvalidKeyError, KeyFault
from svc.end_signal import EndSignal


class Connection:
    """A connection that the test closes.

    Args:
        tells: its scope has its end; otherwise only who waits for a message hears of it.
    """

    def __init__(self, tells: bool) -> None:
        self.tells = tells
        self.closed = asyncio.Event()
        self.lost = EndSignal()
        self.scope: Scope = {"state": {LOST: self.lost} if tells else {}}

    def close(self) -> None:
        self.closed.set()
        self.lost.end()

    async def receive(self) -> Message:
        await self.closed.wait()
        return {"type": "http.disconnect"}


@pytest.fixture(params=[True, False], ids=["told", "asked"])
async def connection(request: pytest.FixtureRequest) -> Connection:
    return Connection(request.param)


async def test_work_that_ends_is_ended_by_nobody(connection: Connection) -> None:
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    await while_connected(connection.scope, connection.receive, work())
    assert done.is_set()


async def test_the_error_of_the_work_is_raised(connection: Connection) -> None:
    async def work() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await while_connected(connection.scope, connection.receive, work())


async def test_a_client_that_leaves_ends_the_work_and_waits_for_its_cleaning_up(connection: Connection) -> None:
    cleaned = asyncio.Event()

    async def work() -> None:
        try:
            connection.close()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    with pytest.raises(ClientGoneError):
        await while_connected(connection.scope, connection.receive, work())
    assert cleaned.is_set()


async def test_cancelling_it_from_outside_ends_the_work(connection: Connection) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(while_connected(connection.scope, connection.receive, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_key_that_ends_ends_the_work(connection: Connection) -> None:
    ended = EndSignal()
    connection.scope["state"]["key_ended"] = ended

    async def work() -> None:
        ended.end(InvalidKeyError(KeyFault.REVOKED, "the key is revoked"))
        await asyncio.sleep(60)

    with pytest.raises(InvalidKeyError, match="revoked"):
        await while_connected(connection.scope, connection.receive, work())


async def test_a_client_that_leaves_while_the_work_is_cancelled_from_outside_does_not_hide_that(
    connection: Connection,
) -> None:
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(while_connected(connection.scope, connection.receive, work()))
    await started.wait()
    connection.close()
    if not connection.tells:  # it has to be asked first
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_comes_after_the_work_is_cancelled_by_nobody(connection: Connection) -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    await while_connected(connection.scope, connection.receive, work())
    connection.close()
    await asyncio.sleep(0.01)
    assert (task := asyncio.current_task()) is not None
    assert task.cancelling() == 0
