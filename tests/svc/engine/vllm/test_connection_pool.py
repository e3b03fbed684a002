"""Requests share connections; whatever an engine does with one, an answer is whole or an error, and nothing stays."""

import asyncio
import socket as sockets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
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
from svc.engine.vllm.connection_pool import EngineConnections
from tests.svc.engine.raw_server import (
    ANSWER,
    LAST_CHUNK,
    STREAM,
    Peer,
    RawServer,
    Reply,
    chunk,
    raw_server,
    say,
    silence,
)

HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def socket() -> Iterator[Path]:
    """Short, because the path of a unix socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="svc") as folder:
        yield Path(folder) / "engine.sock"


@asynccontextmanager
async def engine(
    socket: Path, *replies: Reply, silence_s: float = 10.0, idle_s: float = 10.0
) -> AsyncIterator[tuple[EngineConnections, RawServer]]:
    """Connections to a server that replies so."""
    async with raw_server(socket, *replies) as server:
        with closing(EngineConnections(socket, silence_s=silence_s, idle_s=idle_s)) as pool:
            yield pool, server


async def ask(pool: EngineConnections, payload: bytes = b"{}") -> bytes:
    """The body of an answer."""
    async with pool.post("/v1/completions", payload, "req-1") as answer:
        return await answer.read()


async def until_closed(server: RawServer) -> None:
    """Returns when no connection is open at the server."""
    async with asyncio.timeout(5):
        for peer in server.peers:
            await peer.closed.wait()


class TestRequests:
    async def test_a_request_says_what_the_engine_needs(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool, b'{"n":1}')
        head, body = server.requests[0].split(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
        assert {
            b"host: engine",
            b"accept-encoding: identity",
            b"content-type: application/json",
            b"x-request-id: req-1",
            b"content-length: 7",
        } == set(head.split(b"\r\n")[1:])
        assert body == b'{"n":1}'

    async def test_one_without_a_body(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server), pool.get("/health") as answer:
            assert answer.status == 200
        assert server.requests[0].startswith(b"GET /health HTTP/1.1\r\n")

    async def test_an_answer_says_what_it_is(self, socket: Path) -> None:
        refusal = ANSWER.replace(b"200 OK", b"400 Bad Request")
        async with engine(socket, say(STREAM + LAST_CHUNK), say(refusal)) as (pool, _):
            async with pool.post("/", b"", "1") as answer:
                assert (answer.status, answer.is_event_stream) == (200, True)
                assert answer.content_type == "text/event-stream; charset=utf-8"
            async with pool.post("/", b"", "1") as answer:
                assert (answer.status, answer.is_event_stream) == (400, False)
                assert await answer.read() == b"{}"

    async def test_a_large_request_comes_whole(self, socket: Path) -> None:
        payload = b"x" * 5_000_000
        async with engine(socket, say(ANSWER)) as (pool, server):
            assert await ask(pool, payload) == b"{}"
        assert server.requests[0].endswith(b"\r\n\r\n" + payload)

    async def test_a_thousand_at_once(self, socket: Path) -> None:
        async def reply(peer: Peer) -> None:
            own = peer.asked.rpartition(b"\r\n\r\n")[2]
            await peer.say(STREAM)
            for _ in range(3):
                await asyncio.sleep(0.01)
                await peer.say(chunk(own + b","))
            await peer.say(LAST_CHUNK)

        async with engine(socket, reply) as (pool, server):
            answers = await asyncio.gather(*(ask(pool, b"%d" % number) for number in range(1000)))
            assert answers == [b"%d," % number * 3 for number in range(1000)]
            assert len(server.peers) == 1000


class TestKeptConnections:
    @pytest.mark.parametrize("reply", [say(ANSWER), say(STREAM, chunk(b"{}"), LAST_CHUNK)], ids=["length", "chunks"])
    async def test_two_requests_share_one(self, socket: Path, reply: Reply) -> None:
        async with engine(socket, reply) as (pool, server):
            assert [await ask(pool), await ask(pool)] == [b"{}", b"{}"]
            assert (len(server.requests), len(server.peers)) == (2, 1)

    async def test_requests_at_the_same_time_do_not(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            async with pool.post("/", b"", "1") as one, pool.post("/", b"", "2") as other:
                assert [await one.read(), await other.read()] == [b"{}", b"{}"]
            assert len(server.peers) == 2

    @pytest.mark.parametrize("noticed", [True, False])
    async def test_the_engine_may_close_it_between_requests(self, socket: Path, noticed: bool) -> None:
        async with engine(socket, say(ANSWER, then_hang_up=noticed), say(ANSWER)) as (pool, server):
            await ask(pool)
            if noticed:
                await until_closed(server)
            else:
                server.peers[0].hang_up()  # and the event loop has not seen it
            assert await ask(pool) == b"{}"
            assert (len(server.requests), len(server.peers)) == (2, 2)

    async def test_one_that_breaks_before_the_answer_is_no_failure(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), say(then_hang_up=True), say(ANSWER)) as (pool, server):
            await ask(pool)
            assert await ask(pool) == b"{}"
            assert (len(server.requests), len(server.peers)) == (3, 2)

    async def test_a_request_is_sent_once_more_and_no_oftener(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), say(ANSWER), say(then_hang_up=True)) as (pool, server):
            async with pool.post("/", b"", "1") as one, pool.post("/", b"", "2") as other:
                await one.read()
                await other.read()
            with pytest.raises(BrokenConnectionError):
                await ask(pool)
            assert len(server.requests) == 4

    async def test_once_a_byte_of_the_answer_came_it_is_not(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), say(b"H", then_hang_up=True), say(ANSWER)) as (pool, server):
            await ask(pool)
            with pytest.raises(BrokenConnectionError):
                await ask(pool)
            assert len(server.requests) == 2

    async def test_nor_over_a_new_connection(self, socket: Path) -> None:
        async with engine(socket, say(then_hang_up=True), say(ANSWER)) as (pool, server):
            with pytest.raises(BrokenConnectionError):
                await ask(pool)
            assert len(server.requests) == 1

    async def test_an_engine_that_may_have_died_of_a_request_was_not_unreachable(self, socket: Path) -> None:
        async def die(peer: Peer) -> None:
            server.stop_listening()
            peer.hang_up()

        async with engine(socket, say(ANSWER), die) as (pool, server):
            await ask(pool)
            with pytest.raises(BrokenConnectionError):
                await ask(pool)

    async def test_one_that_died_before_it_read_the_request_was(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool)
            server.peers[0].stop_reading()
            asking = asyncio.create_task(ask(pool))
            await asyncio.sleep(0.05)
            server.stop_listening()
            server.peers[0].hang_up()
            with pytest.raises(UnreachableError):
                await asking

    async def test_one_that_the_engine_will_close_is_not_used_again(self, socket: Path) -> None:
        last = ANSWER.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        async with engine(socket, say(last), say(ANSWER)) as (pool, server):
            assert [await ask(pool), await ask(pool)] == [b"{}", b"{}"]
            assert len(server.peers) == 2

    async def test_bytes_that_nobody_asked_for_are_nobodys_answer(self, socket: Path) -> None:
        other = ANSWER.replace(b"{}", b"[]")
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool)
            await server.peers[0].say(other)
            await server.peers[0].closed.wait()
            assert await ask(pool) == b"{}"
            assert len(server.peers) == 2

    async def test_bytes_behind_an_answer_neither(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER + b"[]"), say(ANSWER + ANSWER), say(ANSWER)) as (pool, server):
            assert [await ask(pool), await ask(pool), await ask(pool)] == [b"{}", b"{}", b"{}"]
            assert len(server.peers) == 3

    async def test_it_is_given_up_before_the_engine_does(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), idle_s=0.1) as (pool, server):
            async with pool.post("/", b"", "1") as one, pool.post("/", b"", "2") as other:
                await one.read()
                await other.read()
            await asyncio.sleep(0.05)
            await ask(pool)
            assert server.open == 2
            await asyncio.sleep(0.08)
            assert server.open == 1  # the one that was used again
            await until_closed(server)

    async def test_one_that_is_too_old_takes_no_request_whether_or_not_it_was_closed(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), idle_s=0.05) as (pool, server):
            await ask(pool)
            time.sleep(0.1)  # the loop was busy: no timer has run
            await ask(pool)
            assert len(server.peers) == 2


class TestUnreachable:
    async def test_nobody_made_the_socket(self, socket: Path) -> None:
        with closing(EngineConnections(socket, silence_s=1)) as pool, pytest.raises(UnreachableError):
            await ask(pool)

    async def test_nobody_listens(self, socket: Path) -> None:
        with sockets.socket(sockets.AF_UNIX) as bound:
            bound.bind(str(socket))
            with closing(EngineConnections(socket, silence_s=1)) as pool, pytest.raises(UnreachableError):
                await ask(pool)

    async def test_more_wait_for_the_engine_than_it_lets_wait(self, socket: Path) -> None:
        with sockets.socket(sockets.AF_UNIX) as listener, sockets.socket(sockets.AF_UNIX) as first:
            listener.bind(str(socket))
            listener.listen(0)
            first.connect(str(socket))
            pool = EngineConnections(socket, silence_s=1, connect_timeout_s=0.1)
            with closing(pool), pytest.raises(UnreachableError):
                await ask(pool)

    async def test_they_come_through_once_it_takes_them(self, socket: Path) -> None:
        with sockets.socket(sockets.AF_UNIX) as listener, sockets.socket(sockets.AF_UNIX) as first:
            listener.bind(str(socket))
            listener.listen(0)
            first.connect(str(socket))
            with closing(EngineConnections(socket, silence_s=5)) as pool:
                asking = asyncio.create_task(ask(pool))
                await asyncio.sleep(0.05)
                listener.accept()[0].close()
                listener.setblocking(False)
                loop = asyncio.get_running_loop()
                taken, _ = await loop.sock_accept(listener)
                with taken:
                    await loop.sock_recv(taken, 1000)
                    taken.sendall(ANSWER)
                    assert await asking == b"{}"

    async def test_the_connections_were_closed(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool)
            pool.close()
            assert pool.is_closed
            with pytest.raises(UnreachableError):
                await ask(pool)
            await until_closed(server)


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
    async def test_what_came_can_be_read_before_the_error(self, socket: Path, said: bytes, came: bytes | None) -> None:
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
    async def test_what_is_no_http_is_an_error_at_once(self, socket: Path, said: bytes) -> None:
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
    async def test_a_head_and_whatever_is_like_one_ends(self, socket: Path, said: bytes) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(said)
            for _ in range(1000):
                await peer.say(b"x" * 1000)

        async with engine(socket, reply) as (pool, server):
            with pytest.raises(MalformedAnswerError):
                await asyncio.wait_for(ask(pool), 5)
            await until_closed(server)

    async def test_a_body_that_is_read_whole_has_a_limit(self, socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("svc.engine.vllm.connection_pool._MOST_WHOLE_BYTES", 1)
        async with engine(socket, say(ANSWER)) as (pool, _):
            with pytest.raises(MalformedAnswerError):
                await ask(pool)


class TestSilence:
    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1", STREAM, STREAM + chunk(b"{}")])
    async def test_an_engine_that_says_nothing_more_is_given_up(self, socket: Path, said: bytes) -> None:
        async with engine(socket, say(said), silence_s=0.1) as (pool, server):
            with pytest.raises(SilenceError):
                await asyncio.wait_for(ask(pool), 5)
            await until_closed(server)
            assert len(server.requests) == 1

    async def test_nor_on_a_kept_connection_is_it_asked_again(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), silence, silence_s=0.1) as (pool, server):
            await ask(pool)
            with pytest.raises(SilenceError):
                await asyncio.wait_for(ask(pool), 5)
            assert len(server.requests) == 2

    @pytest.mark.slow
    async def test_an_answer_may_take_longer_than_a_silence(self, socket: Path) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(STREAM)
            for _ in range(10):
                await asyncio.sleep(0.05)
                await peer.say(chunk(b"x"))
            await peer.say(LAST_CHUNK)

        async with engine(socket, reply, silence_s=0.2) as (pool, _):
            assert await ask(pool) == b"x" * 10
            assert await ask(pool) == b"x" * 10

    async def test_who_takes_nothing_cannot_call_the_engine_silent(self, socket: Path) -> None:
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


class TestLeaving:
    async def test_early_ends_the_engines_work(self, socket: Path) -> None:
        async with engine(socket, say(STREAM, chunk(b"x"))) as (pool, server):
            async with pool.post("/", b"", "1") as answer:
                assert await answer.read_some() == b"x"
            await until_closed(server)

    async def test_a_whole_answer_unread_keeps_the_connection(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            async with pool.post("/", b"", "1"):
                pass
            assert await ask(pool) == b"{}"
            assert len(server.peers) == 1

    @pytest.mark.parametrize("said", [b"", STREAM], ids=["head", "body"])
    async def test_who_is_cancelled_while_waiting_leaves_nothing(self, socket: Path, said: bytes) -> None:
        async with engine(socket, say(said)) as (pool, server):
            before = asyncio.all_tasks()
            asking = asyncio.create_task(ask(pool))
            await asyncio.sleep(0.05)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await until_closed(server)
            assert asyncio.all_tasks() == before

    @pytest.mark.parametrize("ticks", range(8))
    async def test_who_is_cancelled_while_connecting_leaves_nothing(self, socket: Path, ticks: int) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            asking = asyncio.create_task(ask(pool))
            for _ in range(ticks):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            pool.close()
            await asyncio.sleep(0.02)
            await until_closed(server)

    async def test_nothing_of_an_answer_can_be_had_afterwards(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, _):
            async with pool.post("/", b"", "1") as answer:
                pass
            with pytest.raises(AttributeError):
                await answer.read_some()

    async def test_closing_all_connections_breaks_off_what_runs(self, socket: Path) -> None:
        async with engine(socket, silence) as (pool, server):
            asking = [asyncio.create_task(ask(pool)) for _ in range(3)]
            await asyncio.sleep(0.05)
            pool.close()
            assert {type(found) for found in await asyncio.gather(*asking, return_exceptions=True)} == {
                BrokenConnectionError
            }
            await until_closed(server)
            assert len(server.requests) == 3


async def test_an_answer_that_is_not_taken_waits_in_the_engine(socket: Path) -> None:
    size = 20_000_000

    async def reply(peer: Peer) -> None:
        await peer.say(STREAM)
        for _ in range(size // 10_000):
            await peer.say(chunk(b"x" * 10_000))
        await peer.say(LAST_CHUNK)

    async with engine(socket, reply, say(ANSWER)) as (pool, server):
        async with pool.post("/", b"", "1") as answer:
            assert await answer.read_some()
            await asyncio.sleep(0.2)
            assert server.peers[0].said < 2_000_000
            while await answer.read_some():
                pass
            assert server.peers[0].said > size
        assert await ask(pool)
        assert len(server.peers) == 1


class Wire(asyncio.Transport):
    """What a connection writes goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Nowhere."""

    def abort(self) -> None:
        """Closes it."""
        self._closing = True

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self._closing


PARTS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@given(body=PARTS, chunked=st.booleans(), cuts=st.sets(st.integers(1, 600)))
def test_wherever_the_bytes_are_cut_the_answer_is_the_same(body: list[bytes], chunked: bool, cuts: set[int]) -> None:
    whole = b"".join(body)
    length = HEAD + b"content-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(whole)
    said = STREAM + b"".join(map(chunk, body)) + LAST_CHUNK if chunked else length + whole
    assert asyncio.run(answer_of(cut(said, sorted(at for at in cuts if at < len(said))))) == whole


async def test_also_at_every_byte() -> None:
    said = STREAM + chunk(b"one") + chunk(b"two") + LAST_CHUNK
    assert await answer_of([bytes([byte]) for byte in said]) == b"onetwo"


async def test_a_connection_that_was_lost_before_it_was_asked_is_an_error_at_once() -> None:
    connection = EngineConnection(10, set())
    connection.connection_made(Wire())
    connection.connection_lost(None)
    with pytest.raises(BrokenConnectionError):
        await asyncio.wait_for(connection.ask(b""), 1)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """The data in pieces."""
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


async def answer_of(pieces: list[bytes]) -> bytes:
    """The body of an answer that comes so, taken as it comes."""
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


def test_all_that_can_go_wrong_is_one_kind() -> None:
    for kind in (UnreachableError, BrokenConnectionError, MalformedAnswerError, SilenceError):
        assert issubclass(kind, ConnectionFailedError)


class TestPassingOn:
    """A body that is given to somebody within the callback that reads it."""

    async def test_each_part_is_given_as_it_comes(self, socket: Path) -> None:
        taken: list[bytes] = []
        more = asyncio.Event()

        async def reply(peer: Peer) -> None:
            await peer.say(STREAM + chunk(b"one"))
            await more.wait()
            await peer.say(chunk(b"two") + LAST_CHUNK)

        def take(part: bytes) -> bool:
            taken.append(part)
            more.set()
            return True

        async with engine(socket, reply) as (pool, server):
            async with pool.post("/", b"", "1") as answer:
                assert await answer.pass_to(take)
            assert taken == [b"one", b"two"]
            assert await ask(pool) == b"onetwo"
        assert len(server.peers) == 1  # it is whole, and its connection was kept

    @given(sizes=st.lists(st.sampled_from([1, 1000, 70_000]), min_size=1, max_size=8), full=st.lists(st.booleans()))
    def test_who_takes_no_more_at_once_loses_nothing(self, sizes: list[int], full: list[bool]) -> None:
        parts = [bytes([number]) * size for number, size in enumerate(sizes)]
        rounds = iter(full)
        taken: list[bytes] = []

        def take(part: bytes) -> bool:
            taken.append(part)
            return not next(rounds, False)

        async def run() -> None:
            with tempfile.TemporaryDirectory(prefix="svc") as folder:
                reply = say(STREAM + b"".join(map(chunk, parts)) + LAST_CHUNK)
                async with (
                    engine(Path(folder) / "engine.sock", reply) as (pool, _),
                    pool.post("/", b"", "1") as answer,
                    asyncio.timeout(10),
                ):
                    while not await answer.pass_to(take):
                        await asyncio.sleep(0)

        asyncio.run(run())
        assert b"".join(taken) == b"".join(parts)

    async def test_what_the_taker_raises_is_raised_and_ends_the_connection(self, socket: Path) -> None:
        def take(part: bytes) -> bool:
            raise ZeroDivisionError

        async def pass_on(pool: EngineConnections) -> None:
            async with pool.post("/", b"", "1") as answer:
                await answer.pass_to(take)

        async def reply(peer: Peer) -> None:
            await peer.say(STREAM)
            await asyncio.sleep(0.01)
            await peer.say(chunk(b"one"))
            await asyncio.sleep(60)

        async with engine(socket, reply) as (pool, server):
            with pytest.raises(ZeroDivisionError):
                await pass_on(pool)
            await until_closed(server)

    async def test_a_body_that_breaks_off_is_an_error_after_what_came(self, socket: Path) -> None:
        taken: list[bytes] = []

        async def reply(peer: Peer) -> None:
            await peer.say(STREAM + chunk(b"one"))
            peer.hang_up()

        def take(part: bytes) -> bool:
            taken.append(part)
            return True

        async def pass_on(pool: EngineConnections) -> None:
            async with pool.post("/", b"", "1") as answer:
                await answer.pass_to(take)

        async with engine(socket, reply) as (pool, _):
            with pytest.raises(BrokenConnectionError):
                await pass_on(pool)
        assert taken == [b"one"]

    async def test_silence_in_the_middle_is_one(self, socket: Path) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(STREAM + chunk(b"one"))
            await asyncio.sleep(60)

        async def pass_on(pool: EngineConnections) -> None:
            async with pool.post("/", b"", "1") as answer:
                await answer.pass_to(lambda part: True)

        async with engine(socket, reply, silence_s=0.2) as (pool, _):
            with pytest.raises(SilenceError):
                await pass_on(pool)
