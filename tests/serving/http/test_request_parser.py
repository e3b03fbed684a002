"""Tests that offers of another protocol are ignored, as if the request had no `Upgrade` header."""

import asyncio
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from serving.http.body import read_body
from tests.serving.http.raw_connection import connected

pytestmark = pytest.mark.slow

BODY = b'{"model": "tuned"}'
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
LENGTH, CHUNKED = b"content-length: %d\r\n" % len(BODY), b"transfer-encoding: chunked\r\n"
CHUNKS = b"a\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (BODY[:10], len(BODY) - 10, BODY[10:])
JAVA = """
import java.net.*; import java.net.http.*;
class Ask {
    public static void main(String[] given) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(given[0])).header("content-type", "application/json")
            .POST(HttpRequest.BodyPublishers.ofString(given[1])).build();
        System.out.print(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body());
    }
}
"""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that responds with the method, the target and, for a POST, the body."""
    body = b""
    if scope["method"] == "POST":
        body = await read_body(dict(scope["headers"]), receive, max_bytes=2**20, timeout_s=2)
    answer = b"%b %b?%b %b" % (scope["method"].encode(), scope["raw_path"], scope["query_string"], body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


def head(offer: bytes, framing: bytes = b"", method: bytes = b"POST") -> bytes:
    return b"%b /v1?q HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n%b%b\r\n" % (
        method,
        offer,
        framing,
    )


async def answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(3):
        lines = await reader.readuntil(b"\r\n\r\n")
        assert lines.startswith(b"HTTP/1.1 200 OK"), lines
        length = next(line for line in lines.split(b"\r\n") if line.startswith(b"content-length"))
        return await reader.readexactly(int(length.partition(b":")[2]))


@pytest.mark.parametrize(
    ("framing", "body", "offer"),
    [(LENGTH, BODY, H2C), (CHUNKED, CHUNKS, WEBSOCKET)],
    ids=["h2c with length", "websocket in chunks"],
)
@pytest.mark.parametrize("cuts", [(), (0,), (7,), (-30, 5)], ids=["one packet", "later", "in body", "in head and body"])
async def test_body_is_read_if_the_request_offers_a_protocol_upgrade(
    framing: bytes, body: bytes, offer: bytes, cuts: Sequence[int]
) -> None:
    async with connected(echo) as (reader, writer):
        begun = head(offer, framing)
        sent = begun + body
        ends = [*(len(begun) + cut for cut in cuts), len(sent)]
        start = 0
        for end in ends:
            writer.write(sent[start:end])
            await writer.drain()
            await asyncio.sleep(0.02)
            start = end
        assert await answer(reader) == b"POST /v1?q " + BODY


@pytest.mark.parametrize("at_once", [True, False], ids=["pipelined", "kept"])
@pytest.mark.parametrize(("framing", "body"), [(LENGTH, BODY), (CHUNKED, CHUNKS)], ids=["length", "chunked"])
async def test_requests_on_one_connection_are_all_answered_if_each_offers_a_protocol_upgrade(
    framing: bytes, body: bytes, at_once: bool
) -> None:
    async with connected(echo) as (reader, writer):
        asked = [head(H2C, framing) + body, head(H2C, method=b"GET"), head(b"", LENGTH) + BODY]
        if at_once:
            writer.write(b"".join(asked))
        for request, expected in zip(asked, (b"POST /v1?q " + BODY, b"GET /v1?q ", b"POST /v1?q " + BODY), strict=True):
            if not at_once:
                writer.write(request)
            assert await answer(reader) == expected


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_connection_is_closed_after_the_response_if_the_client_requests_it(version: bytes) -> None:
    async with connected(echo) as (reader, writer):
        asked = head(H2C.replace(b"Upgrade,", b"Upgrade, close,"), LENGTH) + BODY
        writer.write(asked.replace(b"HTTP/1.1", b"HTTP/" + version))
        assert await answer(reader) == b"POST /v1?q " + BODY
        assert await reader.read() == b""


async def test_body_that_looks_like_a_request_is_not_parsed_as_a_request() -> None:
    async with connected(echo) as (reader, writer):
        inner = head(b"", method=b"GET")
        writer.write(head(H2C, b"content-length: %d\r\n" % len(inner)))
        await asyncio.sleep(0.02)
        writer.write(inner)
        assert await answer(reader) == b"POST /v1?q " + inner
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read()


async def test_hundreds_of_upgrade_requests_in_one_packet_are_all_answered() -> None:
    async with connected(echo) as (reader, writer):
        writer.write(300 * head(H2C, method=b"GET"))
        for _ in range(300):
            assert await answer(reader) == b"GET /v1?q "


@pytest.mark.parametrize("target", [b"localhost:443", b"http://localhost/v1?secret"])
async def test_http_connect_request_gets_one_response_for_any_target(target: bytes) -> None:
    async with connected(echo) as (reader, writer):
        writer.write(b"CONNECT %b HTTP/1.1\r\nhost: localhost\r\n%b\r\n" % (target, H2C))
        async with asyncio.timeout(3):
            assert await reader.readexactly(9) == b"HTTP/1.1 "


async def test_nothing_is_logged_if_a_request_offers_a_protocol_upgrade(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "uvicorn")
    async with connected(echo) as (reader, writer):
        for offer in (H2C, WEBSOCKET):
            writer.write(head(offer, method=b"GET"))
            assert await answer(reader) == b"GET /v1?q "
    assert [record for record in caplog.records if record.levelno >= logging.WARNING or "/v1" in record.message] == []


async def run(*command: str) -> str:
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl_speaks_http2() -> bool:
    curl = shutil.which("curl")
    return curl is not None and "HTTP2" in subprocess.check_output([curl, "--version"], text=True)


@pytest.mark.skipif(not curl_speaks_http2(), reason="curl with HTTP/2 is not installed")
async def test_curl_is_answered_if_it_requests_http2() -> None:
    async with connected(echo) as (_, writer):
        port = writer.get_extra_info("peername")[1]
        output = await run(
            "curl",
            "-sS",
            "--http2",
            "--noproxy",
            "*",
            "-H",
            "content-type: application/json",
            "-d",
            BODY.decode(),
            f"http://127.0.0.1:{port}/v1?q",
            f"http://127.0.0.1:{port}/v1?q",
        )
        assert output == 2 * f"POST /v1?q {BODY.decode()}"


@pytest.mark.skipif(shutil.which("javac") is None, reason="Java's compiler is not installed")
async def test_java_client_is_answered_if_it_offers_http2(tmp_path: Path) -> None:
    source = tmp_path / "Ask.java"
    source.write_text(JAVA)
    async with connected(echo) as (_, writer):
        port = writer.get_extra_info("peername")[1]
        output = await run("java", str(source), f"http://127.0.0.1:{port}/v1?q", BODY.decode())
        assert output == f"POST /v1?q {BODY.decode()}"
