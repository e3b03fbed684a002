"""Tests that requests with a foreign host name are rejected, as after DNS rebinding."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.serving.service import CHAT, Service


@pytest.fixture
async def service(socket_folder: Path) -> AsyncIterator[Service]:
    async with Service(socket_folder, host="mine.lan", allowed_hosts=("Chat.example.org",)).run() as service:
        yield service


async def test_request_with_an_ip_address_or_allowed_name_as_host_is_accepted(client: httpx.AsyncClient) -> None:
    cases: list[str] = [
        *("localhost", "localhost:8000", "LOCALHOST.", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "mine.lan:80"),
        *("chat.example.org", "chat.example.org:443"),
    ]
    for host in cases:
        assert (await client.get("/health", headers={"host": host})).status_code == 200, host


async def test_request_with_a_disallowed_host_is_rejected_on_every_path(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/metrics", "/svc/status", "/none"):
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
            answer = await client.get(path, headers={"host": host})
            assert answer.status_code == 421, (path, host)
            assert answer.json()["error"]["code"] == "host_not_allowed"
            assert "serve.allowed_hosts" in answer.json()["error"]["message"]
            assert answer.headers["x-request-id"]


async def test_completion_with_a_disallowed_host_does_not_reach_the_engine(
    client: httpx.AsyncClient, service: Service
) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT, headers={"host": "evil.example"})
    assert answer.status_code == 421
    assert service.double.requests == []


async def test_asterisk_in_allowed_hosts_allows_every_host(socket_folder: Path) -> None:
    async with Service(socket_folder, allowed_hosts=("*",)).run() as service, service.client() as client:
        assert (await client.get("/health", headers={"host": "any.example"})).status_code == 200
