"""Tests reading a request body and enforcing its limits."""

import asyncio
from collections.abc import Sequence

import pytest
from starlette.types import Message, Receive

from serving.http.body import (
    BodyTimeoutError,
    BodyTooLargeError,
    ClientGoneError,
    MediaTypeError,
    read_body,
)


def headers(**more: str) -> dict[bytes, bytes]:
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in more.items()}
    return {name.encode(): value.encode() for name, value in given.items()}


def receiving(*parts: bytes, gone: bool = False) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if gone:
        messages.append({"type": "http.disconnect"})
    else:
        messages[-1]["more_body"] = False

    async def receive() -> Message:
        return messages.pop(0)

    return receive


async def test_body_arriving_in_chunks_is_read_completely() -> None:
    assert await read_body(headers(), receiving(b"ab", b"", b"c"), max_bytes=3, timeout_s=1) == b"abc"


async def test_body_is_not_read_if_its_declared_size_is_too_large() -> None:
    with pytest.raises(BodyTooLargeError):
        await read_body(headers(content_length="4"), receiving(b""), max_bytes=3, timeout_s=1)


async def test_body_is_rejected_if_it_grows_too_large_while_being_read() -> None:
    receive = receiving(b"ab", b"cd", b"ef")
    with pytest.raises(BodyTooLargeError):
        await read_body(headers(), receive, max_bytes=3, timeout_s=1)
    assert (await receive())["body"] == b"ef"


async def test_body_read_times_out_if_the_body_does_not_arrive() -> None:
    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(BodyTimeoutError):
        await read_body(headers(), never, max_bytes=3, timeout_s=0.01)


async def test_disconnect_during_body_upload_raises_client_gone() -> None:
    with pytest.raises(ClientGoneError):
        await read_body(headers(), receiving(b"a", gone=True), max_bytes=3, timeout_s=1)


async def test_media_types_other_than_json_are_rejected() -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        with pytest.raises(MediaTypeError):
            await read_body(headers(content_type=media_type), receiving(b"{}"), max_bytes=3, timeout_s=1)


async def test_charset_in_the_content_type_is_ignored() -> None:
    given = headers(content_type="Application/JSON; charset=utf-8")
    assert await read_body(given, receiving(b"{}"), max_bytes=3, timeout_s=1) == b"{}"


class Slot:
    """A context manager that counts how often it is entered."""

    def __init__(self) -> None:
        self.entered = 0

    def __enter__(self) -> None:
        self.entered += 1

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("parts", "entered"), [([b"{}"], 0), ([b"{", b"}"], 1)], ids=["whole", "in parts"])
async def test_request_body_occupies_a_read_slot_only_if_it_arrives_in_several_chunks(
    parts: Sequence[bytes], entered: int
) -> None:
    slot = Slot()
    assert await read_body(headers(), receiving(*parts), max_bytes=3, slot=lambda: slot) == b"{}"
    assert slot.entered == entered
