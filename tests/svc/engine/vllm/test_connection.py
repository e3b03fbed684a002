"""Tests that every response is complete or an error, and no connection leaks, whatever an engine does."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.engine.vllm.connection import (
    BrokenConnectionError,
    ConnectionFailedError,
    EngineConnection,
    MalformedAnswerError,
    SilenceError,
    UnreachableError,
)
from tests.svc.engine.raw_server import ANSWER, LAST_CHUNK, STREAM, Peer, chunk, say, silence
from tests.svc.engine.vllm.raw_engine import ask, engine, until_closed

HEAD = b"HTTP/1.1 200 OK\r\n"


class TestBrokenAnswers:
    @pytest.mark.parametrize(
        ("said", "came"),
        [
            (b"", None),
            (b"HTTP/1.1 200", None),
            (HEAD + b"content-length: 5\r\n\r\n", b""),
            (HEAD + b"content-length: 5\r\n\r\n{}", b"{}"),
            (STREAM, b""),
            (STREAM + chunk(b"{}"), b"{}"),
            (STREAM + b"ff\r\n{}", b"{}"),
            (STREAM + chunk(b"{}") + b"0\r\n", b"{}"),
        ],
    )
    async def test_received_bytes_can_be_read_before_the_connection_error_is_raised(
        self, socket: Path, said: bytes, came: bytes | None
    ) -> None:
        found = None

        async def read() -> None:
            nonlocal found
            async with pool.post("/", b"", "1") as answer:
                found = b""
                while part := await answer.read_some():
                    found += part

        async with engine(socket, say(said, then_hang_up=True)) as (pool, _):
            with pytest.raises(BrokenConnectionError):
                await read()
        assert found == came

    @pytest.mark.parametrize(
        "said",
        [
            b"nonsense\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/2 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 0\r\n\r\n",
            HEAD + b"\r\n{}",
            HEAD + b"content-length: -1\r\n\r\n{}",
            HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
            HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
            HEAD + b"transfer-encoding: gzip\r\n\r\n{}",
            STREAM + b"xyz\r\n{}\r\n",
            STREAM + b"2\r\n{}}}\r\n",
            STREAM + b"fffffffffffffffffff\r\n{}\r\n",
        ],
    )
    async def test_non_http_response_raises_error_immediately(self, socket: Path, said: bytes) -> None:
        async with engine(socket, say(said)) as (pool, server):
            with pytest.raises(MalformedAnswerError):
                await asyncio.wait_for(ask(pool), 5)
            await until_closed(server)

    @pytest.mark.parametrize(
        "said",
        [
            HEAD + b"x: ",
            HEAD + b"content-length: 2\r\nx",
            STREAM + b"2;",
            STREAM + chunk(b"{}") + b"0\r\nx: ",
        ],
        ids=["value", "name", "extension", "trailer"],
    )
    async def test_endless_response_header_is_rejected(self, socket: Path, said: bytes) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(said)
            for _ in range(1000):
                await peer.say(b"x" * 1000)

        async with engine(socket, reply) as (pool, server):
            with pytest.raises(MalformedAnswerError):
                await asyncio.wait_for(ask(pool), 5)
            await until_closed(server)

    async def test_size_limit_applies_to_a_fully_buffered_response_body(
        self, socket: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svc.engine.vllm.connection_pool._MAX_BODY_BYTES", 1)
        async with engine(socket, say(ANSWER)) as (pool, _):
            with pytest.raises(MalformedAnswerError):
                await ask(pool)


class TestSilence:
    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1", STREAM, STREAM + chunk(b"{}")])
    async def test_request_times_out_when_the_engine_is_silent(self, socket: Path, said: bytes) -> None:
        async with engine(socket, say(said), silence_s=0.1) as (pool, server):
            with pytest.raises(SilenceError):
                await asyncio.wait_for(ask(pool), 5)
            await until_closed(server)
            assert len(server.requests) == 1

    async def test_timed_out_request_on_a_reused_connection_is_not_retried(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), silence, silence_s=0.1) as (pool, server):
            await ask(pool)
            with pytest.raises(SilenceError):
                await asyncio.wait_for(ask(pool), 5)
            assert len(server.requests) == 2

    @pytest.mark.slow
    async def test_response_may_take_longer_than_the_silence_timeout_while_data_keeps_arriving(
        self, socket: Path
    ) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(STREAM)
            for _ in range(10):
                await asyncio.sleep(0.05)
                await peer.say(chunk(b"x"))
            await peer.say(LAST_CHUNK)

        async with engine(socket, reply, silence_s=0.2) as (pool, _):
            assert await ask(pool) == b"x" * 10
            assert await ask(pool) == b"x" * 10

    @pytest.mark.slow
    async def test_silence_timeout_does_not_include_time_when_the_client_is_not_reading(self, socket: Path) -> None:
        clock = asyncio.get_running_loop().time
        async with (
            engine(socket, say(STREAM, chunk(b"x")), silence_s=0.1) as (pool, _),
            pool.post("/", b"", "1") as answer,
        ):
            assert await answer.read_some() == b"x"
            await asyncio.sleep(0.25)
            began = clock()
            with pytest.raises(SilenceError):
                await answer.read_some()
            assert clock() - began > 0.09


class TestArrival:
    @pytest.mark.slow
    async def test_arrival_time_of_a_response_chunk_does_not_depend_on_when_it_is_read(self, socket: Path) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(STREAM + chunk(b"a"))
            await asyncio.sleep(0.1)
            await peer.say(chunk(b"b") + chunk(b"c"))

        async with engine(socket, reply) as (pool, _), pool.post("/", b"", "1") as answer:
            await asyncio.sleep(0.3)
            came = [(await answer.read_some(), answer.arrived) for _ in range(2)]
        assert [part for part, _ in came] == [b"a", b"bc"]
        assert came[1][1] - came[0][1] > 0.09

    @pytest.mark.slow
    async def test_silence_timeout_does_not_run_while_backpressure_pauses_the_response(self, socket: Path) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(STREAM)
            for _ in range(200):
                await peer.say(chunk(b"x" * 10_000))
            await peer.say(LAST_CHUNK)

        async with engine(socket, reply) as (pool, server), pool.post("/", b"", "1") as answer:
            await answer.read_some()
            first = answer.arrived
            await asyncio.sleep(1)
            assert server.peers[0].said < 2_000_000
            while await answer.read_some():
                pass
            assert answer.arrived - first < 0.9


class Wire(asyncio.Transport):
    """A transport that discards written data."""

    def __init__(self) -> None:
        super().__init__()
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Discard the data."""

    def abort(self) -> None:
        """Close the transport."""
        self._closing = True

    def is_closing(self) -> bool:
        """Return whether the transport has been closed."""
        return self._closing


PARTS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@pytest.mark.slow
@given(body=PARTS, chunked=st.booleans(), cuts=st.sets(st.integers(1, 600)))
def test_response_is_parsed_identically_for_any_split_into_packets(
    body: list[bytes], chunked: bool, cuts: set[int]
) -> None:
    whole = b"".join(body)
    length = HEAD + b"content-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(whole)
    said = STREAM + b"".join(map(chunk, body)) + LAST_CHUNK if chunked else length + whole
    assert asyncio.run(answer_of(cut(said, sorted(at for at in cuts if at < len(said))))) == whole


async def test_response_is_parsed_identically_when_received_byte_by_byte() -> None:
    said = STREAM + chunk(b"one") + chunk(b"two") + LAST_CHUNK
    assert await answer_of([bytes([byte]) for byte in said]) == b"onetwo"


async def test_request_on_a_lost_connection_raises_error_immediately() -> None:
    connection = EngineConnection(10, set())
    connection.connection_made(Wire())
    connection.connection_lost(None)
    with pytest.raises(BrokenConnectionError):
        await asyncio.wait_for(connection.ask(b""), 1)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """Split the data at the given positions."""
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


async def answer_of(pieces: list[bytes]) -> bytes:
    """Return the body of a response that arrives in these pieces and is read on arrival."""
    connection = EngineConnection(10, set())
    connection.connection_made(Wire())
    asking = asyncio.ensure_future(connection.ask(b""))
    await asyncio.sleep(0)
    found = list[bytes]()

    async def take() -> None:
        await asking
        while part := await connection.read_some():
            found.append(part)

    taking = asyncio.ensure_future(take())
    for piece in pieces:
        connection.data_received(piece)
        await asyncio.sleep(0)
    await asyncio.wait_for(taking, 1)
    assert connection.complete
    assert connection.release()
    connection.close()
    return b"".join(found)


def test_all_connection_failures_raise_the_same_exception_type() -> None:
    for kind in (UnreachableError, BrokenConnectionError, MalformedAnswerError, SilenceError):
        assert issubclass(kind, ConnectionFailedError)
