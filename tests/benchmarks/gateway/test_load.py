"""Tests that the benchmark's clients detect the end of a response and count wrong responses."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gateway.load import Address, Ask, Client, Load, Turns
from benchmarks.gateway.upstream import Request, events, whole

WHOLE, STREAM = Ask(chunks=2), Ask(chunks=2, stream=True)
EVENTS = events(Request(stream=True, chunks=2, usage=False))


def framed(parts: Sequence[bytes]) -> bytes:
    """Return the body encoded as HTTP chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def with_length(body: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a response with a Content-Length header."""
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def in_chunks(parts: Sequence[bytes]) -> bytes:
    """Return a chunked response."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed(parts)


class Wire(asyncio.Transport):
    """Test double for a transport that records the requests sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: Any) -> None:
        """Record a sent request."""
        self.sent.append(bytes(data))

    def close(self) -> None:
        """Record that the connection was closed."""


def heard(ask: Ask, parts: Sequence[bytes], *, requests: int = 1, closes: bool = False) -> tuple[Load, int]:
    """Return the load counts of a client that receives these bytes, and the number of requests it sent."""

    async def hear() -> tuple[Load, int]:
        load, turns, wire = Load(), Turns(requests), Wire()
        turns.begin(60)
        client = Client(ask, ask.request(Address(1)), load, turns)
        client.connection_made(wire)
        client.send()
        for part in parts:
            client.data_received(part)
        if closes:
            client.connection_lost(None)
        return load, len(wire.sent)

    return asyncio.run(hear())


def cut(data: bytes, places: set[int]) -> list[bytes]:
    """Split the bytes at the given places."""
    ends = [*sorted({place % len(data) for place in places} | {0}), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


@given(places=st.sets(st.integers(min_value=0, max_value=2000)))
@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (WHOLE, with_length(whole(2))),
        (WHOLE, in_chunks([whole(2)])),
        (STREAM, in_chunks(EVENTS)),
        (STREAM, with_length(b"".join(EVENTS))),
    ],
)
def test_response_is_read_completely_regardless_of_chunk_boundaries(ask: Ask, answer: bytes, places: set[int]) -> None:
    load, sent = heard(ask, cut(answer, places) + cut(answer, places), requests=2)
    assert (load.done, load.failed, len(load.first), sent) == (2, 0, 2, 2)


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (WHOLE, with_length(b"{}", status=b"503 Service Unavailable")),
        (STREAM, in_chunks(EVENTS[:1])),
        (STREAM, in_chunks([EVENTS[-1]])),
    ],
    ids=["an error", "no end", "too few chunks"],
)
def test_unexpected_response_counts_as_failed(ask: Ask, answer: bytes) -> None:
    load, _ = heard(ask, [answer])
    assert (load.done, load.failed) == (0, 1)
    assert load.wrong


def test_malformed_response_counts_as_failed() -> None:
    load, _ = heard(STREAM, [in_chunks(EVENTS)[:-5]], closes=True)
    assert (load.done, load.failed) == (0, 1)


def test_response_is_complete_even_if_the_server_then_closes_the_connection() -> None:
    load, _ = heard(WHOLE, [with_length(whole(2))], closes=True)
    assert (load.done, load.failed) == (1, 0)


def test_response_headers_do_not_count_as_the_first_event() -> None:
    head = in_chunks(EVENTS).partition(b"data: ")[0]
    load, _ = heard(STREAM, [head])
    assert load.first == []
