"""Ends the work for a client when the client goes away or its key ends, whether or not anything was sent yet."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive, Scope

from serving.http.authentication import KeyEnd
from serving.http.connections import ABORT
from serving.protocols.request import ClientGoneError


async def while_connected(
    receive: Receive, work: Coroutine[object, object, None], key_ended: KeyEnd | None = None
) -> None:
    """Runs `work` to its end, or cancels it at once when the client leaves or its key is right no more.

    Args:
        receive: the connection, after its body was read.
        key_ended: None where there is no key.

    Raises:
        ClientGoneError: the client left first.
        InvalidKeyError: its key ended first. Otherwise what `work` raises.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(disconnected(receive))
    try:
        ends = (working, leaving) if key_ended is None else (working, leaving, key_ended)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        leaving.cancel()
        # The work gives back its place and its connection before this returns.
        await asyncio.wait((working, leaving))
    if working.cancelled():
        if key_ended is not None and key_ended.done():
            raise key_ended.result()
        raise ClientGoneError
    working.result()


async def cut_off(scope: Scope, receive: Receive) -> None:
    """Ends the connection of a client that would not read its end either."""
    if abort := scope["state"].get(ABORT):
        abort()
        await disconnected(receive)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
