"""Tests that the server speaks only HTTP and does not log what clients send."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from tests.serving.http.keyed_service import KeyedService
from tests.serving.http.raw_connection import connected
from tests.serving.service import Service

pytestmark = pytest.mark.slow

QUERY = "token=SECRET"
HANDSHAKE = (
    "connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
MALFORMED = b"GET /v1?token=SECRET HTTP/1.1\r\nno header\r\n\r\n"


async def shake_hands(app: Any, path: str, host: str = "localhost") -> tuple[int, Any]:
    """Return the status and content of the response to a WebSocket handshake."""
    async with connected(app) as (reader, writer), asyncio.timeout(5):
        writer.write(f"GET {path}?{QUERY} HTTP/1.1\r\nhost: {host}\r\n{HANDSHAKE}\r\n".encode())
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        length = next(line for line in lines if line.startswith("content-length"))
        return int(lines[0].split()[1]), json.loads(await reader.readexactly(int(length.partition(":")[2])))


@pytest.mark.parametrize(
    ("path", "host", "status", "code"),
    [
        ("/v1/models", "localhost", 401, "invalid_api_key"),
        ("/none", "localhost", 401, "invalid_api_key"),
        ("/v1/models", "evil.example", 421, "host_not_allowed"),
    ],
)
async def test_websocket_handshake_is_rejected_like_any_get_request_if_a_key_is_required(
    socket_folder: Path, store: Store, path: str, host: str, status: int, code: str
) -> None:
    service = KeyedService(socket_folder, store=store)
    async with service.run():
        service.key()
        answered, content = await shake_hands(service.app, path, host)
    assert (answered, content["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("path", "status", "code"), [("/none", 404, "not_found"), ("/v1/chat/completions", 405, "method_not_allowed")]
)
async def test_websocket_handshake_is_answered_like_any_get_request_if_no_key_is_required(
    service: Service, path: str, status: int, code: str
) -> None:
    answered, content = await shake_hands(service.app, path)
    assert (answered, content["error"]["code"]) == (status, code)


async def test_query_string_is_not_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "uvicorn.error")
    for path in ("/none", "/v1/models", "/v1/chat/completions"):
        await shake_hands(service.app, path)
    async with connected(service.app) as (reader, writer):
        writer.write(MALFORMED)
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
    assert not [record for record in caplog.records if "SECRET" in record.getMessage()]


async def test_warning_about_malformed_requests_is_logged_once(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "uvicorn.error")  # the engine's double sets it higher
    for sent in 3 * [MALFORMED] + 3 * [
        b"CONNECT http://x/y?token=SECRET HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    ]:
        async with connected(service.app) as (reader, writer), asyncio.timeout(5):
            writer.write(sent)
            assert await reader.readline()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == len(set(warnings)), warnings
    assert not [warning for warning in warnings if "WebSocket" in warning]
