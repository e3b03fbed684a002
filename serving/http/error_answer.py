"""Sends an error as a complete response, and makes sure that the client can read it."""

import asyncio
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

from serving.http.body import BODY_TIMEOUT_S, ClientGoneError, discard_body
from serving.http.errors import ApiError
from serving.protocols.error_code import ErrorCode

_BODY_STILL_SENT = frozenset({ErrorCode.BODY_TOO_LARGE, ErrorCode.UNSUPPORTED_MEDIA_TYPE})
_DISCARDED_BYTES = 64 * 2**20


async def answer_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error as the response, and discard the rest of the request body if it is still arriving."""
    response = error.response(scope["path"])
    if error.code not in _BODY_STILL_SENT:
        await response(scope, _no_receive, send)
        return

    async def send_more(message: Message) -> None:
        more = {"more_body": True} if message["type"] == "http.response.body" else {}
        await send({**message, **more})

    # The rest of the body is read: if a connection is closed while its client is still sending, the answer is lost.
    await response(scope, _no_receive, send_more)
    with suppress(ClientGoneError, TimeoutError):
        async with asyncio.timeout(BODY_TIMEOUT_S):
            await discard_body(receive, most=_DISCARDED_BYTES)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _no_receive() -> dict[str, str]:
    return {"type": "http.disconnect"}
