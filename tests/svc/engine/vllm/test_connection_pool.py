"""Tests that requests share connections, survive broken ones, and never see each other's data."""

import asyncio
import socket as sockets
import time
from contextlib import closing
from pathlib import Path

import pytest

from svc.engine.vllm.connection import BrokenConnectionError, UnreachableError
from svc.engine.vllm.connection_pool import EngineConnections
from tests.svc.engine.raw_server import ANSWER, LAST_CHUNK, STREAM, Peer, Reply, chunk, say, silence
from tests.svc.engine.vllm.raw_engine import ask, engine, until_closed


class TestRequests:
    async def test_request_has_the_headers_required_by_the_engine(self, socket: Path) -> None:
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

    async def test_request_without_a_body_can_be_sent(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server), pool.get("/health") as answer:
            assert answer.status == 200
        assert server.requests[0].startswith(b"GET /health HTTP/1.1\r\n")

    async def test_response_has_status_and_content_type(self, socket: Path) -> None:
        refusal = ANSWER.replace(b"200 OK", b"400 Bad Request")
        async with engine(socket, say(STREAM + LAST_CHUNK), say(refusal)) as (pool, _):
            async with pool.post("/", b"", "1") as answer:
                assert (answer.status, answer.is_event_stream) == (200, True)
                assert answer.content_type == "text/event-stream; charset=utf-8"
            async with pool.post("/", b"", "1") as answer:
                assert (answer.status, answer.is_event_stream) == (400, False)
                assert await answer.read() == b"{}"

    async def test_large_request_is_sent_in_full(self, socket: Path) -> None:
        payload = b"x" * 5_000_000
        async with engine(socket, say(ANSWER)) as (pool, server):
            assert await ask(pool, payload) == b"{}"
        assert server.requests[0].endswith(b"\r\n\r\n" + payload)

    @pytest.mark.slow
    async def test_each_of_1000_concurrent_requests_receives_its_own_response(self, socket: Path) -> None:
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
    async def test_consecutive_requests_reuse_a_connection(self, socket: Path, reply: Reply) -> None:
        async with engine(socket, reply) as (pool, server):
            assert [await ask(pool), await ask(pool)] == [b"{}", b"{}"]
            assert (len(server.requests), len(server.peers)) == (2, 1)

    async def test_concurrent_requests_use_different_connections(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            async with pool.post("/", b"", "1") as one, pool.post("/", b"", "2") as other:
                assert [await one.read(), await other.read()] == [b"{}", b"{}"]
            assert len(server.peers) == 2

    @pytest.mark.parametrize("noticed", [True, False])
    async def test_request_succeeds_after_the_engine_closed_an_idle_connection(
        self, socket: Path, noticed: bool
    ) -> None:
        async with engine(socket, say(ANSWER, then_hang_up=noticed), say(ANSWER)) as (pool, server):
            await ask(pool)
            if noticed:
                await until_closed(server)
            else:
                server.peers[0].hang_up()  # and the event loop has not seen it
            assert await ask(pool) == b"{}"
            assert (len(server.requests), len(server.peers)) == (2, 2)

    async def test_request_is_retried_when_a_reused_connection_breaks_before_the_response(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), say(then_hang_up=True), say(ANSWER)) as (pool, server):
            await ask(pool)
            assert await ask(pool) == b"{}"
            assert (len(server.requests), len(server.peers)) == (3, 2)

    async def test_request_is_retried_only_once(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), say(ANSWER), say(then_hang_up=True)) as (pool, server):
            async with pool.post("/", b"", "1") as one, pool.post("/", b"", "2") as other:
                await one.read()
                await other.read()
            with pytest.raises(BrokenConnectionError):
                await ask(pool)
            assert len(server.requests) == 4

    async def test_request_is_not_retried_after_any_response_byte_was_received(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), say(b"H", then_hang_up=True), say(ANSWER)) as (pool, server):
            await ask(pool)
            with pytest.raises(BrokenConnectionError):
                await ask(pool)
            assert len(server.requests) == 2

    async def test_request_is_not_retried_when_a_new_connection_breaks(self, socket: Path) -> None:
        async with engine(socket, say(then_hang_up=True), say(ANSWER)) as (pool, server):
            with pytest.raises(BrokenConnectionError):
                await ask(pool)
            assert len(server.requests) == 1

    async def test_engine_is_not_reported_unreachable_if_the_request_may_have_crashed_it(self, socket: Path) -> None:
        async def die(peer: Peer) -> None:
            server.stop_listening()
            peer.hang_up()

        async with engine(socket, say(ANSWER), die) as (pool, server):
            await ask(pool)
            with pytest.raises(BrokenConnectionError):
                await ask(pool)

    async def test_engine_is_reported_unreachable_if_it_died_before_reading_the_request(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool)
            server.peers[0].stop_reading()
            asking = asyncio.create_task(ask(pool))
            await asyncio.sleep(0.05)
            server.stop_listening()
            server.peers[0].hang_up()
            with pytest.raises(UnreachableError):
                await asking

    async def test_connection_with_a_connection_close_header_is_not_reused(self, socket: Path) -> None:
        last = ANSWER.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        async with engine(socket, say(last), say(ANSWER)) as (pool, server):
            assert [await ask(pool), await ask(pool)] == [b"{}", b"{}"]
            assert len(server.peers) == 2

    async def test_unsolicited_bytes_are_not_read_as_a_response(self, socket: Path) -> None:
        other = ANSWER.replace(b"{}", b"[]")
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool)
            await server.peers[0].say(other)
            await server.peers[0].closed.wait()
            assert await ask(pool) == b"{}"
            assert len(server.peers) == 2

    async def test_surplus_bytes_after_a_response_are_not_read_as_the_next_response(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER + b"[]"), say(ANSWER + ANSWER), say(ANSWER)) as (pool, server):
            assert [await ask(pool), await ask(pool), await ask(pool)] == [b"{}", b"{}", b"{}"]
            assert len(server.peers) == 3

    async def test_pool_closes_idle_connections_before_the_engine_does(self, socket: Path) -> None:
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

    async def test_expired_connection_is_not_reused_even_if_still_open(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER), idle_s=0.05) as (pool, server):
            await ask(pool)
            time.sleep(0.1)  # the loop was busy: no timer has run
            await ask(pool)
            assert len(server.peers) == 2


class TestUnreachable:
    async def test_engine_without_a_socket_is_unreachable(self, socket: Path) -> None:
        with closing(EngineConnections(socket, silence_s=1)) as pool, pytest.raises(UnreachableError):
            await ask(pool)

    async def test_engine_is_unreachable_when_nothing_listens_on_the_socket(self, socket: Path) -> None:
        with sockets.socket(sockets.AF_UNIX) as bound:
            bound.bind(str(socket))
            with closing(EngineConnections(socket, silence_s=1)) as pool, pytest.raises(UnreachableError):
                await ask(pool)

    async def test_engine_with_a_full_backlog_is_unreachable(
        self, socket: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svc.engine.vllm.connection_pool._CONNECT_TIMEOUT_S", 0.1)
        with sockets.socket(sockets.AF_UNIX) as listener, sockets.socket(sockets.AF_UNIX) as first:
            listener.bind(str(socket))
            listener.listen(0)
            first.connect(str(socket))
            pool = EngineConnections(socket, silence_s=1)
            with closing(pool), pytest.raises(UnreachableError):
                await ask(pool)

    async def test_waiting_request_is_sent_as_soon_as_the_engine_accepts_its_connection(self, socket: Path) -> None:
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

    async def test_engine_is_unreachable_after_the_pool_is_closed(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            await ask(pool)
            pool.close()
            assert pool.is_closed
            with pytest.raises(UnreachableError):
                await ask(pool)
            await until_closed(server)


class TestLeaving:
    async def test_exiting_a_response_context_early_closes_the_connection(self, socket: Path) -> None:
        async with engine(socket, say(STREAM, chunk(b"x"))) as (pool, server):
            async with pool.post("/", b"", "1") as answer:
                assert await answer.read_some() == b"x"
            await until_closed(server)

    async def test_connection_is_reused_after_an_unread_but_complete_response(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            async with pool.post("/", b"", "1"):
                pass
            assert await ask(pool) == b"{}"
            assert len(server.peers) == 1

    @pytest.mark.parametrize("said", [b"", STREAM], ids=["head", "body"])
    async def test_request_cancelled_while_waiting_for_a_response_leaks_no_task_or_connection(
        self, socket: Path, said: bytes
    ) -> None:
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
    async def test_request_cancelled_while_connecting_leaks_no_connection(self, socket: Path, ticks: int) -> None:
        async with engine(socket, say(ANSWER)) as (pool, server):
            asking = asyncio.create_task(ask(pool))
            for _ in range(ticks):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            pool.close()
            await asyncio.sleep(0.02)
            await until_closed(server)

    async def test_response_cannot_be_read_after_its_async_with_block_ends(self, socket: Path) -> None:
        async with engine(socket, say(ANSWER)) as (pool, _):
            async with pool.post("/", b"", "1") as answer:
                pass
            with pytest.raises(AttributeError):
                await answer.read_some()

    async def test_closing_the_pool_aborts_running_requests(self, socket: Path) -> None:
        async with engine(socket, silence) as (pool, server):
            asking = [asyncio.create_task(ask(pool)) for _ in range(3)]
            await asyncio.sleep(0.05)
            pool.close()
            assert {type(found) for found in await asyncio.gather(*asking, return_exceptions=True)} == {
                BrokenConnectionError
            }
            await until_closed(server)
            assert len(server.requests) == 3


@pytest.mark.slow
async def test_less_than_2_mb_of_an_unread_response_is_buffered(socket: Path) -> None:
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
