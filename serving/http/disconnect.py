"""Cancels the work for a client that disconnects or whose key becomes invalid, even if nothing has been sent yet."""

import asyncio
from collections.abc import Coroutine

from serving.http.body import ClientGoneError
from serving.http.connections import Connection
from serving.http.request_state import RequestState


async def while_connected(state: RequestState, work: Coroutine[object, object, None]) -> None:
    """Run `work` in the caller's task. Cancel it if the client disconnects, if the client's key becomes invalid, or if
    admission interrupts the request, which happens only to batch requests.

    Exceptions raised by `work` propagate unchanged.

    Raises:
        ClientGoneError: the client disconnected before `work` was done.
        InterruptedRequestError: the request was interrupted before `work` was done.
        InvalidKeyError: the client's key became invalid before `work` was done.
    """
    signals = [state.connection.lost, *([state.grant.ended] if state.grant else ())]
    if state.interruption is not None:
        signals.append(state.interruption)
    working, running, cancelled = asyncio.current_task(), True, False
    assert working is not None  # noqa: S101 - a coroutine runs in a task
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
            raise  # the task was cancelled from elsewhere, too
        raise next((signal.error for signal in signals if signal.error), ClientGoneError()) from None
    finally:
        running = False
        if cancelled:
            working.uncancel()
        for signal in signals:
            signal.forget(cancel)


async def cut_off(connection: Connection) -> None:
    """Abort the connection of a client that has stopped reading, and wait until it is closed."""
    lost = asyncio.Event()
    connection.lost.listen(lost.set)
    connection.abort()
    await lost.wait()
