"""Tests that nothing a server writes, shows or responds with contains a secret or its hash."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.access.keyring import IssuedKey
from svc.identity.key_secret import hash_secret, new_secret
from svc.identity.principal import Scope
from svc.settings.monitoring import RequestLogSettings
from svc.settings.serve import ServeSettings
from tests.builders.commands import type_in
from tests.builders.keys import make_key, write_key
from tests.serving.control import BODY
from tests.serving.home import Home
from tests.serving.versions import NAME

pytestmark = pytest.mark.slow


class Used:
    """A server that has been used, with all of its output."""

    def __init__(self, home: Home, client: httpx.AsyncClient, tmp_path: Path) -> None:
        self.home = home
        self.client = client
        self.tmp_path = tmp_path
        self.admin = make_key(home, Scope.ADMIN)
        self.one = make_key(home, Scope.INFER, Scope.FEEDBACK)
        self.wrong = new_secret(self.one.key.id)
        self.told: list[str] = []

    @property
    def secrets(self) -> list[str]:
        """Return all secrets used so far."""
        return [self.admin.secret, self.one.secret, self.wrong]

    async def ask(self, method: str, path: str, secret: str, body: Any = None, **headers: str) -> httpx.Response:
        """Send one request and collect its response."""
        given = {"authorization": f"Bearer {secret}"} | headers
        answer = await self.client.request(method, path, json=body, headers=given)
        self.told.append(f"{answer.headers} {answer.text}")
        return answer

    async def chat(self) -> None:
        """Send valid and invalid requests of all kinds, with secrets in the wrong places."""
        one, path = self.one.secret, "/v1/chat/completions"
        await self.ask("POST", path, one, BODY)
        await self.ask("POST", path, one, BODY | {"stream": True, "user": one})
        await self.ask("POST", path, one, BODY | {"model": one})
        await self.ask("POST", path, one, BODY | {"messages": [{"role": "user", "content": f"it is {one}"}]})
        answer = await self.ask("POST", path, one, BODY, **{"x-request-id": one, "x-client-request-id": one})
        rating = {"request_id": answer.headers["x-request-id"], "rating": "bad", "correction": one, "label": one}
        await self.ask("POST", "/v1/feedback", one, rating)
        await self.ask("POST", "/v1/feedback", one, {"request_id": one, "rating": one})
        await self.ask("GET", f"/v1/models/{one}?key={one}", one)
        for wrong in (self.wrong, one[:-1], "none", f"{one} {one}"):
            await self.ask("POST", path, wrong, BODY)
            await self.ask("GET", f"/{one}", wrong, **{"x-api-key": wrong})

    async def fail(self, patch: pytest.MonkeyPatch) -> None:
        """Cause a defect that leaves a traceback."""

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        with patch.context() as context:
            context.setattr("serving.models.router.Router.find", broken)
            assert (await self.ask("POST", "/v1/chat/completions", self.one.secret, BODY)).status_code == 500

    async def administer(self) -> None:
        """Send changes as an admin, with secrets in the wrong places."""
        admin, one = self.admin.secret, self.one.secret
        await self.ask("POST", "/svc/promote", admin, {"version": f"{NAME}@2", "reason": f"as {one} said"})
        await self.ask("POST", "/svc/promote", admin, {"version": one})
        await self.ask("POST", "/svc/rollback", admin, {"model": one, one: 1})
        await self.ask("POST", "/svc/keys/revoke", admin, {"key": one})
        await self.ask("POST", "/svc/keys", admin, {"name": one, "models": [one]})
        await self.ask("GET", f"/svc/swaps/{one}", admin)
        for path in ("/svc/keys", "/svc/status", "/metrics", f"/svc/swaps/{NAME}"):
            await self.ask("GET", path, admin)
        await self.ask("GET", "/metrics", admin, accept="application/openmetrics-text")
        made = await self.client.post("/svc/keys", json={"name": "third"}, headers={"authorization": f"Bearer {admin}"})
        self.third = str(made.json()["secret"])

    async def type(self) -> None:
        """Run commands on this machine and on another one."""
        key_file = str(write_key(self.tmp_path, self.admin))
        elsewhere = ("--server", str(self.client.base_url), "--key-file", key_file)
        for command in (
            ("status", "--json"),
            ("keys", "list", "--json"),
            (*elsewhere, "keys", "list", "--json"),
            (*elsewhere, "keys", "revoke", self.one.secret, "--yes"),
            (*elsewhere, "status", "--verbose"),
            ("keys", "revoke", self.one.key.id, "--yes", "--reason", f"{self.one.secret} was found"),
            ("audit", "--json"),
        ):
            result = await type_in(self.home, *command)
            self.told.append(f"{result.output} {result.exception!r} {result.exception}")


@pytest.fixture
async def used(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Used:
    """Return a server that stores and logs as much as possible, after it has handled all these requests."""
    home.settings = home.settings.model_copy(
        update={
            "serve": ServeSettings(port=0),
            "request_log": RequestLogSettings(content_share=1.0),
        }
    )
    caplog.set_level(logging.DEBUG)
    make_key(home, Scope.ADMIN, name="first")
    async with home.serving(f"{NAME}@1") as client:
        used = Used(home, client, tmp_path)
        await asyncio.sleep(0.6)
        await used.chat()
        await used.fail(monkeypatch)
        await used.administer()
        await used.type()
    # The client of this test logs the requested paths, in the same process.
    logged = [caplog.handler.format(each) for each in caplog.records if str(client.base_url) not in each.getMessage()]
    used.told.append("\n".join(logged))
    return used


def hits(text: str, secrets: list[str]) -> list[str]:
    """Return the secrets found in a text, either the parts that only their owner knows or their hashes."""
    return [secret for secret in secrets if secret[12:36] in text or hash_secret(secret) in text]


async def test_no_output_contains_a_secret(used: Used) -> None:
    secrets = [*used.secrets, used.third]
    assert len(used.told) > 30
    for output in used.told:
        assert not hits(output, secrets), output[:2000]
    _search_files(used.home.settings.home, secrets)
    _search_rows(used.home, secrets)
    asked = json.dumps(used.home.park.double.requests)  # the text of a client's body is sent to its model
    assert not hits(asked, [secret for secret in secrets if secret != used.one.secret])


def _search_files(home: Path, secrets: list[str]) -> None:
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "svc.db" for path in files)
    for path in files:
        content = path.read_bytes().decode("latin-1")
        assert not [secret for secret in secrets if secret[12:36] in content], path
        if not path.name.startswith("svc.db"):
            assert not hits(content, secrets), path


def _search_rows(home: Home, secrets: list[str]) -> None:
    """Check that hashes are stored only in the keys table."""
    with home.store.connect() as connection:
        tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
        assert {"keys", "requests", "audit"} <= set(tables)
        for table in tables:
            rows = str(connection.exec_driver_sql(f'SELECT * FROM "{table}"').all())
            stored = [secret for secret in secrets if hash_secret(secret) in rows]
            assert table == "keys" or not stored, table


def test_secret_search_finds_a_leaked_secret(home: Home) -> None:
    issued: IssuedKey = make_key(home, Scope.INFER)
    assert hits(f"x {issued.secret[8:40]} y", [issued.secret])
    assert hits(f"x {hash_secret(issued.secret)} y", [issued.secret])
    assert not hits(f"x {issued.key.id} y", [issued.secret])
