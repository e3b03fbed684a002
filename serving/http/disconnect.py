"""Ends the work for a client when the client goes away or its key ends, whether or not anything was sent yet."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive, Scope

from serving.http.authentication import KeyEnd
from serving.http.body import ClientGoneError
from serving.http.connections import ABORT, LOST


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Runs `work` to its end, or cancels it at once when the client leaves or its key is right no more.

    It runs in the task of the caller.

    Args:
        scope: of the request. Where it does not have the end of its connection, a task of its own waits for that.
        receive: the connection, after its body was read.

    Raises:
        ClientGoneError: the client left first.
        InvalidKeyError: its key ended first. Otherwise what `work` raises.
    """
    key_ended: KeyEnd | None = scope["state"].get("key_ended")
    lost: asyncio.Future[None] | None = scope["state"].get(LOST)
    leaving = lost or asyncio.create_task(disconnected(receive))
    working, running, cancelled = asyncio.current_task(), True, False
    assert working is not None  # noqa: S101 - it runs in one
    before = working.cancelling()

    def cancel(_: object) -> None:
        nonlocal cancelled
        if running and not cancelled:
            cancelled = True
            working.cancel()

    leaving.add_done_callback(cancel)
    if key_ended is not None:
        key_ended.add_done_callback(cancel)
    try:
        await work
    except asyncio.CancelledError:
        if not cancelled or working.cancelling() > before + 1:
            raise  # somebody else ends it, too
        if key_ended is not None and key_ended.done():
            raise key_ended.result() from None
        raise ClientGoneError from None
    finally:
        running = False
        if cancelled:
            working.uncancel()
        if key_ended is not None:
            key_ended.remove_done_callback(cancel)
        leaving.remove_done_callback(cancel)
        if leaving is not lost:
            leaving.cancel()


async def cut_off(scope: Scope, receive: Receive) -> None:
    """Ends the connection of a client that would not read its end either."""
    if abort := scope["state"].get(ABORT):
        abort()
        await disconnected(receive)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
