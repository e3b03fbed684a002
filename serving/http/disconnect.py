"""Ends the work for a client when the client goes away or its key ends, whether or not anything was sent yet."""

import asyncio
from collections.abc import Coroutine

from serving.http.body import ClientGoneError
from serving.http.connections import Connection
from serving.http.request_state import RequestState


async def while_connected(state: RequestState, work: Coroutine[object, object, None]) -> None:
    """Run `work` to its end, or cancel it immediately when the client leaves or its key becomes invalid.

    It runs in the task of the caller.

    Raises:
        ClientGoneError: the client left first.
        InvalidKeyError: its key ended first. Otherwise what `work` raises.
    """
    signals = [state.connection.lost, *([state.grant.ended] if state.grant else ())]
    working, running, cancelled = asyncio.current_task(), True, False
    assert working is not None  # noqa: S101 - it runs in one
    before = working.cancelling()

    def cancel() -> None:
        nonlocal cancelled
        if running and not cancelled:
            cancelled = True
            working.cancel()

    for signal in signals:
        signal.listen(cancel)
    try:
        await work
    except asyncio.CancelledError:
        if not cancelled or working.cancelling() > before + 1:
            raise  # somebody else ends it, too
        raise next((signal.error for signal in signals if signal.error), ClientGoneError()) from None
    finally:
        running = False
        if cancelled:
            working.uncancel()
        for signal in signals:
            signal.forget(cancel)


async def cut_off(connection: Connection) -> None:
    """End the connection of a client that would not read its end either, and wait until it is lost."""
    lost = asyncio.Event()
    connection.lost.listen(lost.set)
    connection.abort()
    await lost.wait()
