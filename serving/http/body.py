"""Reads the body of a request: as JSON by its type, no larger than it may be, and within its time."""

import asyncio

from starlette.types import Receive, Scope

from serving.http.direct_answer import direct_answer
from serving.http.headers import headers_of
from svc.errors import SvcError

BODY_TIMEOUT_S = 15.0
_JSON_TYPE = b"application/json"


class BodyTooLargeError(SvcError):
    """A body over the limit."""


class BodyTimeoutError(SvcError):
    """A body that did not arrive in time."""


class MediaTypeError(SvcError):
    """A body that does not say it is JSON."""


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to answer."""


def body_here(scope: Scope, *, max_bytes: int) -> bytes | None:
    """The whole body, where it has come with its headers, as most do: nothing has to be waited for.

    Returns:
        None where it has not, for `read_body`.

    Raises:
        MediaTypeError, BodyTooLargeError: see `read_body`.
    """
    _check_headers(scope, max_bytes)
    direct = direct_answer(scope)
    body = direct.take_body() if direct is not None else None
    if body is not None and len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The whole body; its size is checked before and while it is read.

    Raises:
        MediaTypeError: not `application/json`. A web page elsewhere can send any other type to a local port without
            asking first, and that one not.
        BodyTooLargeError, BodyTimeoutError: over `max_bytes`, or not here after `timeout_s` seconds.
        ClientGoneError: the client left before the end.
    """
    _check_headers(scope, max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _receive_all(receive, max_bytes)
    except TimeoutError as error:
        raise BodyTimeoutError(f"the request body did not arrive within {timeout_s:g} s") from error


def _check_headers(scope: Scope, max_bytes: int) -> None:
    headers = headers_of(scope)
    media_type = headers.get(b"content-type", b"")
    if media_type != _JSON_TYPE and media_type.partition(b";")[0].strip().lower() != _JSON_TYPE:
        raise MediaTypeError("the content type is not JSON", expected="content-type: application/json")
    # The server in front has checked that the header is a number.
    if int(headers.get(b"content-length", b"0")) > max_bytes:
        raise _too_large(max_bytes)


async def _receive_all(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def discard_body(receive: Receive, *, most: int) -> None:
    """Reads what is left of a body, up to `most` bytes.

    Raises:
        ClientGoneError: the client left before the end.
    """
    more = True
    while more and most > 0:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        most -= len(message.get("body", b""))
        more = message.get("more_body", False)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError("the request body is too large", expected=f"at most {max_bytes} bytes")
