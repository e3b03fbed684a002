"""How the body of a request is read, and when it is given up."""

import asyncio

import pytest
from starlette.types import Message, Receive, Scope

from serving.http.body import (
    BodyTimeoutError,
    BodyTooLargeError,
    ClientGoneError,
    MediaTypeError,
    body_here,
    read_body,
)
from serving.http.direct_answer import offer_direct_answer


class Flow:
    """That of a connection which is never held up."""

    def resume_reading(self) -> None:
        pass


class Cycle:
    """What uvicorn knows of a request that comes in."""

    def __init__(self, scope: Scope, body: bytes, *, more: bool = False) -> None:
        self.scope, self.body, self.more_body = scope, bytearray(body), more
        self.disconnected = False
        self.message_event, self.flow = asyncio.Event(), Flow()


def scope(**headers: str) -> Scope:
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {"type": "http", "state": {}, "headers": [(name.encode(), value.encode()) for name, value in given.items()]}


def receiving(*parts: bytes, gone: bool = False) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if gone:
        messages.append({"type": "http.disconnect"})
    else:
        messages[-1]["more_body"] = False

    async def receive() -> Message:
        return messages.pop(0)

    return receive


async def test_a_body_in_parts_is_read_whole() -> None:
    assert await read_body(scope(), receiving(b"ab", b"", b"c"), max_bytes=3, timeout_s=1) == b"abc"


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    with pytest.raises(BodyTooLargeError):
        await read_body(scope(content_length="4"), receiving(b""), max_bytes=3, timeout_s=1)


async def test_a_body_that_turns_out_too_large_is_refused_while_it_comes() -> None:
    receive = receiving(b"ab", b"cd", b"ef")
    with pytest.raises(BodyTooLargeError):
        await read_body(scope(), receive, max_bytes=3, timeout_s=1)
    assert (await receive())["body"] == b"ef"


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(BodyTimeoutError):
        await read_body(scope(), never, max_bytes=3, timeout_s=0.01)


async def test_a_client_that_leaves_within_its_body_is_gone() -> None:
    with pytest.raises(ClientGoneError):
        await read_body(scope(), receiving(b"a", gone=True), max_bytes=3, timeout_s=1)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_other_types_than_json_are_refused(media_type: str) -> None:
    with pytest.raises(MediaTypeError):
        await read_body(scope(content_type=media_type), receiving(b"{}"), max_bytes=3, timeout_s=1)


async def test_a_charset_beside_the_type_is_no_matter() -> None:
    headers = scope(content_type="Application/JSON; charset=utf-8")
    assert await read_body(headers, receiving(b"{}"), max_bytes=3, timeout_s=1) == b"{}"


def test_a_server_that_gives_no_body_directly_brings_it_in_messages() -> None:
    assert body_here(scope(), max_bytes=3) is None


async def test_a_body_that_has_come_is_checked_too() -> None:
    whole = scope()
    cycle = Cycle(whole, b"{   }")
    offer_direct_answer(cycle)
    with pytest.raises(BodyTooLargeError):
        body_here(whole, max_bytes=3)
    with pytest.raises(MediaTypeError):
        body_here(scope(content_type="text/plain"), max_bytes=3)


async def test_a_body_of_which_a_part_has_come_is_not_here() -> None:
    part = scope()
    cycle = Cycle(part, b"{", more=True)
    offer_direct_answer(cycle)
    assert body_here(part, max_bytes=3) is None
    cycle.more_body = False
    assert body_here(part, max_bytes=3) == b"{"
