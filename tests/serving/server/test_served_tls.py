"""Tests a server with a certificate, or behind a proxy that has one."""

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from pydantic import ValidationError

from serving.gateway.failed_keys import MAX_INVALID_PER_MINUTE
from serving.server import server
from svc.errors import SettingsError
from svc.identity.principal import Scope
from svc.settings.serve import ServeSettings
from tests.builders.commands import type_in
from tests.builders.keys import make_key
from tests.serving.certificates import make_certificate
from tests.serving.control import ask
from tests.serving.home import Home
from tests.serving.versions import NAME

pytestmark = pytest.mark.slow


@pytest.fixture
def files(home: Home, tmp_path: Path) -> tuple[Path, Path]:
    """Return the certificate of the home's server and its key."""
    certificate, key = make_certificate(tmp_path)
    home.configure(serve={"tls_certificate": certificate, "tls_key": key})
    return certificate, key


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


async def test_official_client_connects_with_tls_and_a_key(home: Home, files: tuple[Path, Path]) -> None:
    issued = make_key(home)
    async with home.serving(f"{NAME}@1") as plain:
        assert plain.base_url.scheme == "https"
        url = f"https://localhost:{plain.base_url.port}/v1"
        async with openai.AsyncOpenAI(
            api_key=issued.secret,
            base_url=url,
            http_client=httpx2.AsyncClient(verify=trusting(files[0])),
            max_retries=0,
        ) as official:
            stream = await official.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "one"}], stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == "1.0 1.1 1.2 1.3 "
            with pytest.raises(openai.AuthenticationError) as raised:
                await official.with_options(api_key="none").models.list()
            assert raised.value.code == "invalid_api_key"


async def test_client_that_distrusts_the_certificate_or_uses_no_tls_fails(home: Home, files: tuple[Path, Path]) -> None:
    async with home.serving(f"{NAME}@1") as client:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await client.get("/health")
        with pytest.raises(httpx.HTTPError):
            await client.get(f"http://localhost:{client.base_url.port}/health")


async def test_new_certificate_is_used_without_a_restart(
    home: Home, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.server.tls._CHECK_INTERVAL_S", 0.02)
    new, new_key = make_certificate(tmp_path, "new")
    context = trusting(new)
    async with home.serving(f"{NAME}@1") as client:
        url = f"https://localhost:{client.base_url.port}/health"
        os.replace(new, files[0])
        os.replace(new_key, files[1])
        async with asyncio.timeout(5):
            while True:
                async with httpx.AsyncClient(verify=context) as other:
                    try:
                        assert (await other.get(url)).status_code == 200
                        break
                    except httpx.ConnectError:
                        await asyncio.sleep(0.02)


async def test_local_commands_need_no_certificate(home: Home, files: tuple[Path, Path]) -> None:
    make_key(home)
    async with home.serving(f"{NAME}@1"):
        result = await type_in(home, "status")
    assert result.exit_code == 0, result.output
    assert f"{NAME}@1" in result.output


async def test_stalled_tls_handshakes_block_other_connections_only_briefly(
    home: Home, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.server.server.raise_descriptor_limit", lambda: 3)
    monkeypatch.setattr("serving.server.http_server.REQUEST_DEADLINE_S", 0.5)
    home.configure(serve={"tls_certificate": files[0], "tls_key": files[1], "max_connections_per_address": 3})
    async with home.serving(f"{NAME}@1") as client:
        port = client.base_url.port
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(0.4):
            assert await closed(reader)
        async with asyncio.timeout(5):
            for each, _ in silent:
                assert await closed(each)
        async with httpx.AsyncClient(verify=trusting(files[0])) as other:
            assert (await other.get(f"https://localhost:{port}/health")).status_code == 200
        for writing in (writer, *(each[1] for each in silent)):
            writing.close()


@pytest.mark.parametrize(("configured", "let_in"), [({}, 2), ({"max_connections_per_address": 3}, 3)])
async def test_connections_per_client_address_are_limited_to_a_share_of_the_total(
    home: Home, monkeypatch: pytest.MonkeyPatch, configured: dict[str, int], let_in: int
) -> None:
    monkeypatch.setattr("serving.server.server.raise_descriptor_limit", lambda: 4)
    home.configure(serve=configured)
    async with home.serving(f"{NAME}@1") as client:
        held = [await asyncio.open_connection("127.0.0.1", client.base_url.port) for _ in range(let_in)]
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        async with asyncio.timeout(3):
            assert await closed(reader)
        for reader, writing in held:
            assert not reader.at_eof()
            writing.close()
        writer.close()


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


def test_address_is_refused_if_keys_would_be_sent_unencrypted() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(SettingsError, match="unencrypted") as raised:
            server.require_safe(ServeSettings(host=host), has_keys=True)
        assert "serve.behind_proxy" in raised.value.expected, host


@pytest.mark.parametrize(
    "given",
    [{"tls_certificate": Path("/c.pem"), "tls_key": Path("/c.key")}, {"behind_proxy": ("10.0.0.0/8",)}],
    ids=["tls", "proxy"],
)
def test_server_with_tls_or_a_proxy_may_listen_on_all_addresses_only_if_keys_exist(given: dict[str, Any]) -> None:
    server.require_safe(ServeSettings(host="0.0.0.0", **given), has_keys=True)
    with pytest.raises(SettingsError, match="no key exists"):
        server.require_safe(ServeSettings(host="0.0.0.0", **given), has_keys=False)


def test_incomplete_or_invalid_tls_and_proxy_settings_are_rejected() -> None:
    cases: list[dict[str, Any]] = [{"tls_certificate": "/c.pem"}, {"tls_key": "/c.key"}, {"behind_proxy": ("proxy",)}]
    for given in cases:
        with pytest.raises(ValidationError):
            ServeSettings(**given)


async def spend(client: httpx.AsyncClient, address: str) -> int:
    """Send one invalid key more than an address may send, and return the last status code."""
    headers = {"x-forwarded-for": address, "x-api-key": "wrong"}
    answers = [await client.get("/v1/models", headers=headers) for _ in range(MAX_INVALID_PER_MINUTE + 1)]
    return answers[-1].status_code


async def test_client_addresses_are_taken_from_a_trusted_proxy(home: Home) -> None:
    home.configure(serve={"behind_proxy": ("127.0.0.0/8",)})
    make_key(home)
    async with home.serving(f"{NAME}@1") as client:
        assert await spend(client, "192.0.2.1") == 429
        answer = await client.get("/v1/models", headers={"x-forwarded-for": "192.0.2.2", "x-api-key": "wrong"})
        assert answer.status_code == 401
        # A client's own value comes before the one that the proxy adds.
        forged = await client.get("/v1/models", headers={"x-forwarded-for": "198.51.100.7, 192.0.2.1"})
        assert forged.status_code == 429


@pytest.mark.parametrize("proxies", [(), ("10.0.0.0/8",)])
async def test_forwarding_headers_from_untrusted_addresses_are_ignored(home: Home, proxies: tuple[str, ...]) -> None:
    home.configure(serve={"behind_proxy": proxies})
    make_key(home, Scope.ADMIN)
    async with home.serving(f"{NAME}@1") as client:
        assert await spend(client, "192.0.2.1") == 429
        answer = await client.get("/v1/models", headers={"x-forwarded-for": "192.0.2.2", "x-api-key": "wrong"})
        assert answer.status_code == 429
        assert (await ask(client, stream=False)).status == 429
