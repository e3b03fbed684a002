"""Tests a server with keys: which requests need a key, and that local ones need none."""

import asyncio
import socket
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine as Store

from serving.access.keyring import Keyring
from serving.access.usage import Usage, UsageOf, add_usage, hour_of
from serving.server import server
from serving.telemetry.usage_writer import UsageWriter
from svc.errors import SettingsError
from svc.identity.principal import Limits, Scope
from svc.remote.server_url import ServerAddress, server_address
from svc.settings.serve import ServeSettings
from tests.builders.actors import ALICE
from tests.builders.commands import type_in
from tests.builders.keys import make_key
from tests.serving.control import BODY, ask, until
from tests.serving.home import Home
from tests.serving.versions import NAME

pytestmark = pytest.mark.slow


@pytest.fixture
async def client(home: Home) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client for a server whose home has a key."""
    make_key(home, Scope.ADMIN)
    async with home.serving(f"{NAME}@1") as client:
        yield client


def local(home: Home) -> ServerAddress:
    address = server_address(home.settings)
    assert address.socket is not None
    return address


async def test_requests_during_server_startup_require_a_key_if_a_key_exists(home: Home) -> None:
    make_key(home)
    home.park.start_delay_s = 0.2
    with server.claim(home.settings) as claim:
        task = asyncio.create_task(home.serve(claim, f"{NAME}@1"))
        async with httpx.AsyncClient(base_url=claim.url, timeout=10) as client:
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 401
        task.cancel()
        await asyncio.wait({task})


async def test_first_key_created_while_the_server_runs_makes_keys_mandatory_and_is_accepted(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as client:
        assert (await ask(client, stream=False)).status == 200
        issued = make_key(home)
        async with asyncio.timeout(1.5):
            while (await ask(client, stream=False)).status != 401:
                await asyncio.sleep(0.05)
        client.headers["x-api-key"] = issued.secret
        assert (await ask(client, stream=True)).words == {"1"}


async def test_key_revocation_takes_effect_within_one_second(home: Home, client: httpx.AsyncClient) -> None:
    issued = make_key(home)
    client.headers["x-api-key"] = issued.secret
    async with asyncio.timeout(1.5):
        while (await ask(client, stream=False)).status != 200:
            await asyncio.sleep(0.05)
    Keyring(home.store, ALICE).revoke(issued.key.id)
    async with asyncio.timeout(1):
        while (await ask(client, stream=False)).status != 401:
            await asyncio.sleep(0.05)


async def test_local_commands_need_no_key(home: Home, client: httpx.AsyncClient) -> None:
    cases: list[tuple[tuple[str, ...], str]] = [
        (("status",), f"{NAME}@1"),
        (("chat", NAME), "1.0 1.1"),
        (("promote", f"{NAME}@2"), "tuned@2 (merged) is served"),
    ]
    for command, said in cases:
        result = await type_in(home, *command, answers="hello\n\n")
        assert result.exit_code == 0, result.output
        assert said in result.output, command


async def test_socket_has_owner_only_permissions_and_is_removed_when_the_server_stops(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        path = local(home).socket
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


async def test_socket_of_a_killed_server_is_replaced(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        path = local(home).socket
    assert path is not None
    with socket.socket(socket.AF_UNIX) as old_socket:
        old_socket.bind(str(path))
    async with home.serving(f"{NAME}@1"):
        assert (await asyncio.to_thread(get, local(home), "/svc/status")).status_code == 200


async def test_any_host_header_is_accepted_through_the_unix_socket(home: Home, client: httpx.AsyncClient) -> None:
    answer = await asyncio.to_thread(get, local(home), "/v1/models", host="evil.example")
    assert answer.status_code == 200
    assert (await client.get("/v1/models", headers={"host": "evil.example"})).status_code == 421


def get(address: ServerAddress, path: str, **headers: str) -> httpx.Response:
    with address.client() as client:
        return client.get(path, headers=headers)


async def test_headers_cannot_make_a_request_count_as_local(client: httpx.AsyncClient) -> None:
    headers = {"through_socket": "true", "x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "unix"}
    assert (await client.get("/svc/status", headers=headers)).status_code == 401


async def test_chat_command_that_uses_the_local_socket_ends_when_the_server_stops(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        home.park.double.token_delay_s = 0.02
        result = asyncio.create_task(type_in(home, "chat", NAME, answers="hello\n\n"))
        await until(lambda: home.park.double.running)
    assert "1.0" in (await result).output


def test_server_without_keys_cannot_listen_on_a_non_loopback_address(home: Home) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        settings = home.settings.model_copy(update={"serve": ServeSettings(host=host, port=0)})
        with pytest.raises(SettingsError, match="no key exists") as raised, server.claim(settings):
            pass
        assert "svc keys create --scope admin" in raised.value.todo, host


def test_server_without_keys_can_listen_on_a_loopback_address(home: Home) -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        server.require_safe(ServeSettings(host=host), has_keys=False)


def test_socket_is_created_even_if_the_home_path_is_long(home: Home, tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 30)
    with server.claim(home.settings.model_copy(update={"home": deep})) as claim:
        assert claim.local.getsockname()


async def test_rate_limit_headers_include_usage_on_another_server(
    home: Home, postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.server.assembly.UsageWriter", partial(UsageWriter, every_s=0.05))
    home.store = postgresql_store
    keyring = Keyring(home.store, ALICE)
    issued = keyring.create(frozenset({Scope.INFER}), limits=Limits(requests_per_minute=100))
    async with home.serving(f"{NAME}@1") as client:

        async def remaining() -> int:
            headers = {"authorization": f"Bearer {issued.secret}"}
            answer = await client.post("/v1/chat/completions", json=BODY, headers=headers)
            return int(answer.headers["x-ratelimit-remaining-requests"])

        assert await remaining() > 90
        used = {UsageOf(hour_of(datetime.now(UTC)), issued.key.id, NAME): Usage(requests=50)}
        await asyncio.to_thread(add_usage, home.store, used)
        async with asyncio.timeout(5):
            while await remaining() > 50:
                await asyncio.sleep(0.5)
