"""Reads request bodies, with limits on their media type, size and arrival time."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from starlette.types import Receive

from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError

BODY_TIMEOUT_S = 15.0
_JSON_TYPE = b"application/json"


@answered_with(413, ErrorCode.BODY_TOO_LARGE)
class BodyTooLargeError(SvcError):
    """Raised when a request body is larger than the limit."""


@answered_with(408, ErrorCode.BODY_TIMEOUT)
class BodyTimeoutError(SvcError):
    """Raised when a request body did not arrive in time."""


@answered_with(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE)
class MediaTypeError(SvcError):
    """Raised when a request's Content-Type is not JSON."""


class ClientGoneError(Exception):
    """Raised when the client has closed the connection."""


async def read_body(
    headers: Mapping[bytes, bytes],
    receive: Receive,
    *,
    max_bytes: int,
    timeout_s: float = BODY_TIMEOUT_S,
    slot: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bytes:
    """Read a request's body, checking its size beforehand and while reading.

    Args:
        slot: function that returns a context manager, which is entered to read the rest of a body that
            arrives in several parts.

    Raises:
        MediaTypeError: the media type is not `application/json`. A web page from another site can send some
            other types to a local port without a preflight request.
        BodyTooLargeError, BodyTimeoutError: the body is larger than `max_bytes`, or incomplete after
            `timeout_s` seconds.
        ClientGoneError: the client disconnected before the body was complete.
    """
    media_type = headers.get(b"content-type", b"")
    if media_type != _JSON_TYPE and media_type.partition(b";")[0].strip().lower() != _JSON_TYPE:
        raise MediaTypeError("the content type is not JSON", expected="content-type: application/json")
    # The server in front has checked that the header is a number.
    _check_size(int(headers.get(b"content-length", b"0")), max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            body, more = await _receive_part(receive)
            _check_size(len(body), max_bytes)
            if more:
                with slot():
                    return await _receive_rest(body, receive, max_bytes)
            return body
    except TimeoutError as error:
        raise BodyTimeoutError(f"the request body did not arrive within {timeout_s:g} s") from error


async def _receive_rest(begin: bytes, receive: Receive, max_bytes: int) -> bytes:
    body, more = bytearray(begin), True
    while more:
        part, more = await _receive_part(receive)
        body += part
        _check_size(len(body), max_bytes)
    return bytes(body)


async def discard_body(receive: Receive, *, most: int) -> None:
    """Read and discard the rest of a request body, up to `most` bytes.

    Raises:
        ClientGoneError: the client disconnected before the body was complete.
    """
    more = True
    while more and most > 0:
        part, more = await _receive_part(receive)
        most -= len(part)


async def _receive_part(receive: Receive) -> tuple[bytes, bool]:
    """Return the next chunk of a request body, and whether more chunks follow."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BodyTooLargeError("the request body is too large", expected=f"at most {max_bytes} bytes")
