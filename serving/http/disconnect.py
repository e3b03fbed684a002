"""Ends the work for a client when the client goes away, whether or not anything was sent yet."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive

from serving.protocols.request import ClientGoneError


async def while_connected(receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Runs `work` to its end, or cancels it at once when the client leaves.

    Args:
        receive: the connection, after its body was read.

    Raises:
        ClientGoneError: the client left first. Otherwise what `work` raises.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        leaving.cancel()
        # The work gives back its place and its connection before this returns.
        await asyncio.wait((working, leaving))
    if working.cancelled():
        raise ClientGoneError
    working.result()


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
