"""Ends the work for a client when the client goes away or its key ends, whether or not anything was sent yet."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive, Scope

from serving.http.body import ClientGoneError
from serving.http.connections import ABORT, LOST
from svc.end_signal import EndSignal


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
    state = scope["state"]
    key_ended: EndSignal | None = state.get("key_ended")
    lost: EndSignal | None = state.get(LOST)
    watching = None if lost is not None else asyncio.create_task(disconnected(receive))
    working, running, cancelled = asyncio.current_task(), True, False
    assert working is not None  # noqa: S101 - it runs in one
    before = working.cancelling()

    def cancel(_: object = None) -> None:
        nonlocal cancelled
        if running and not cancelled:
            cancelled = True
            working.cancel()

    if lost is not None:
        lost.listen(cancel)
    elif watching is not None:
        watching.add_done_callback(cancel)
    if key_ended is not None:
        key_ended.listen(cancel)
    try:
        await work
    except asyncio.CancelledError:
        if not cancelled or working.cancelling() > before + 1:
            raise  # somebody else ends it, too
        if key_ended is not None and key_ended.error is not None:
            raise key_ended.error from None
        raise ClientGoneError from None
    finally:
        running = False
        if cancelled:
            working.uncancel()
        if key_ended is not None:
            key_ended.forget(cancel)
        if lost is not None:
            lost.forget(cancel)
        elif watching is not None:
            watching.cancel()


async def cut_off(scope: Scope, receive: Receive) -> None:
    """Ends the connection of a client that would not read its end either."""
    if abort := scope["state"].get(ABORT):
        abort()
        await disconnected(receive)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
