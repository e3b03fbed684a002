"""Tests administering a server from another machine with a key, as on the server's own machine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from serving.access.keyring import IssuedKey
from svc.cli import group
from svc.errors import (
    AuthenticationError,
    BusyError,
    GateError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    ServerNotRunningError,
    SettingsError,
)
from svc.identity.principal import Scope
from svc.remote.server_url import ServerAddress, server_address
from svc.store.audit import read_events
from svc.store.desired import read_desired
from svc.store.keys import read_keys
from tests.builders.commands import error_of, type_in
from tests.builders.keys import make_key, write_key
from tests.serving.certificates import make_certificate
from tests.serving.control import until
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target
from tests.svc.registry.manifests import gate_report

pytestmark = pytest.mark.slow

Remote = Callable[..., Coroutine[Any, Any, Result]]


@pytest.fixture
def admin(home: Home) -> IssuedKey:
    return make_key(home, Scope.ADMIN)


@pytest.fixture
async def client(home: Home, admin: IssuedKey) -> AsyncIterator[httpx.AsyncClient]:
    async with home.serving(f"{NAME}@1") as client:
        client.headers["authorization"] = f"Bearer {admin.secret}"
        yield client


@pytest.fixture
def remote(client: httpx.AsyncClient, admin: IssuedKey, tmp_path: Path) -> Remote:
    """Return a function that runs `svc` on another machine, which has no home."""

    def type_now(*arguments: str, issued: IssuedKey = admin) -> Result:
        key_file = str(write_key(tmp_path, issued))
        elsewhere = ["--server", str(client.base_url), "--key-file", key_file, "--home", str(tmp_path / "none")]
        return CliRunner().invoke(group, [*elsewhere, *arguments])

    async def type_in(*arguments: str, issued: IssuedKey = admin) -> Result:
        return await asyncio.to_thread(type_now, *arguments, issued=issued)

    return type_in


async def test_remote_promote_and_rollback_commands_print_the_same_output_as_local_commands(
    home: Home, remote: Remote
) -> None:
    result = await remote("promote", f"{NAME}@2")
    assert result.exit_code == 0, result.output
    assert "tuned@2 (merged) is served\n  inplace swap in " in result.output
    assert "files match the manifest" in result.output
    assert "tuned@2 (merged) is already served" in (await remote("promote", f"{NAME}@2")).output
    assert "tuned@1 (merged) is served" in (await remote("rollback", NAME)).output
    desired = read_desired(home.store, NAME)
    assert desired is not None and desired.target == target(1)


async def test_version_with_an_undecided_verdict_is_promoted_remotely_with_a_warning(
    home: Home, remote: Remote
) -> None:
    make_version(home.registry, 4, gates=(gate_report(0.04), gate_report(0.09)))
    result = await remote("promote", f"{NAME}@4")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning: gptq_quality: GPTQ lowered accuracy by 0.010") == 1


async def test_remote_dry_run_shows_the_gates_and_changes_nothing(home: Home, remote: Remote) -> None:
    result = await remote("promote", f"{NAME}@2", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(
        (await type_in(home, "promote", f"{NAME}@2", "--dry-run", "--json")).stdout
    )
    desired = read_desired(home.store, NAME)
    assert desired is not None and desired.target == target(1)


async def test_audit_log_records_the_key_and_peer_of_remote_changes(
    home: Home, remote: Remote, admin: IssuedKey
) -> None:
    await remote("promote", f"{NAME}@2", "--reason", "it is better")
    await remote("keys", "create", "--name", "ci")
    promoted, created = read_events(home.store, newest=2)
    assert (promoted.action, promoted.subject, promoted.reason) == ("promote", f"{NAME}@2", "it is better")
    assert created.action == "key.create"
    for event in (promoted, created):
        assert (event.actor, event.origin) == (f"key:{admin.key.id}", "127.0.0.1")


async def test_remote_status_is_shown(remote: Remote) -> None:
    result = await remote("status")
    assert result.exit_code == 0, result.output
    assert f"{NAME}@1" in result.output


async def test_key_with_the_metrics_scope_can_read_the_status_but_change_nothing(home: Home, remote: Remote) -> None:
    issued = make_key(home, Scope.METRICS)
    await asyncio.sleep(0.6)
    assert f"{NAME}@1" in (await remote("status", issued=issued)).output
    for command in (("promote", f"{NAME}@2"), ("rollback", NAME), ("keys", "list"), ("keys", "create")):
        error = error_of(await remote(*command, issued=issued))
        assert isinstance(error, PermissionDeniedError)
    assert len(read_keys(home.store)) == 2
    desired = read_desired(home.store, NAME)
    assert desired is not None and desired.target == target(1)


async def test_keys_can_be_created_listed_rotated_and_revoked_remotely(home: Home, remote: Remote) -> None:
    made = json.loads((await remote("keys", "create", "--name", "ci", "--model", NAME, "--json")).stdout)
    assert (made["name"], made["models"], made["scopes"]) == ("ci", [NAME], ["feedback", "infer"])
    listed = json.loads((await remote("keys", "list", "--json")).stdout)
    assert [row["name"] for row in listed if row["key_id"] == made["key_id"]] == ["ci"]
    assert "secret" not in listed[0]
    rotated = json.loads((await remote("keys", "rotate", "ci", "--grace", "1h", "--json")).stdout)
    assert rotated["secret"] != made["secret"]
    assert rotated["old_secret_until"]
    assert (await remote("keys", "revoke", "ci", "--yes")).exit_code == 0
    assert [key.revoked_at is not None for key in read_keys(home.store)] == [False, True]
    again = error_of(await remote("keys", "revoke", made["key_id"], "--yes"))
    assert isinstance(again, RefusedError)


async def test_remote_errors_are_the_same_as_local_errors(home: Home, remote: Remote) -> None:
    cases: list[tuple[tuple[str, ...], type[Exception]]] = [
        (("promote", f"{NAME}@9"), NotFoundError),
        (("promote", "other@1"), NotFoundError),
        (("promote", NAME), NotFoundError),
        (("promote", f"{NAME}@4"), GateError),
        (("rollback", "other"), NotFoundError),
        (("rollback", NAME), NotFoundError),
        (("keys", "revoke", "nobody", "--yes"), NotFoundError),
        (("keys", "create", "--name", "no name"), SettingsError),
        (("keys", "create", "--model", "tuned@1"), SettingsError),
    ]
    make_version(home.registry, 4, failed=("GPTQ lost 0.3",))
    for command, kind in cases:
        local = error_of(await type_in(home, *command))
        there = error_of(await remote(*command))
        assert type(local) is type(there) is kind, command
        assert local.wrong in there.wrong, command


async def test_refused_remote_promotion_shows_the_reason_and_the_served_version(home: Home, remote: Remote) -> None:
    make_version(home.registry, 4, probes_of="/elsewhere")
    error = error_of(await remote("promote", f"{NAME}@4"))
    assert isinstance(error, RefusedError)
    assert "tuned@1 (merged) is still served" in error.wrong
    assert "not the version's weights" in error.wrong


async def test_remote_promotion_is_rejected_if_the_same_promotion_is_in_progress(home: Home, remote: Remote) -> None:
    home.park.double.reload_delay_s = 0.5
    first = asyncio.create_task(type_in(home, "promote", f"{NAME}@2"))
    await until(lambda: "/collective_rpc" in home.park.double.calls)
    error = error_of(await remote("promote", f"{NAME}@2"))
    assert isinstance(error, BusyError)
    assert "already in progress" in error.wrong
    assert (await first).exit_code == 0


async def test_remote_command_with_a_revoked_key_raises_authentication_error(
    remote: Remote, home: Home, client: httpx.AsyncClient
) -> None:
    issued = make_key(home, Scope.ADMIN)
    home_keys = await type_in(home, "keys", "revoke", issued.key.id, "--yes")
    assert home_keys.exit_code == 0
    await asyncio.sleep(0.6)
    for command in (("status",), ("promote", f"{NAME}@2")):
        error = error_of(await remote(*command, issued=issued))
        assert isinstance(error, AuthenticationError)
        assert issued.secret not in str(error)


async def test_invalid_bodies_of_remote_commands_are_rejected(client: httpx.AsyncClient) -> None:
    cases: list[tuple[str, Any]] = [
        ("/svc/promote", {"version": f"{NAME}@2", "unknown": 1}),
        ("/svc/promote", {}),
        ("/svc/promote", {"version": f"{NAME}@2", "force": True}),
        ("/svc/promote", {"version": f"{NAME}@2", "format": "onnx"}),
        ("/svc/rollback", {"name": NAME}),
        ("/svc/keys", {"scopes": []}),
        ("/svc/keys", {"limits": {"per_second": 1}}),
        ("/svc/keys/rotate", {"key": "ci", "grace_s": -1}),
        ("/svc/keys/revoke", []),
    ]
    for path, body in cases:
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), path


async def test_response_with_a_secret_is_not_cached(client: httpx.AsyncClient) -> None:
    assert (await client.post("/svc/keys", json={})).headers["cache-control"] == "no-store"


async def test_nothing_can_be_changed_remotely_if_no_key_exists(home: Home) -> None:
    """Another user of the machine cannot change anything either: the owner of the home creates the first key."""
    async with home.serving(f"{NAME}@1") as client:
        for path in ("/svc/keys", "/svc/promote"):
            assert (await client.post(path, json={})).status_code == 401
        answer = await asyncio.to_thread(post, server_address(home.settings), "/svc/keys", {"scopes": ["admin"]})
    assert answer.status_code == 200
    (event,) = read_events(home.store, newest=1)
    assert event.actor.startswith("user:")


def post(address: ServerAddress, path: str, body: Any) -> httpx.Response:
    with address.client() as client:
        return client.post(path, json=body)


async def test_remote_commands_need_the_ca_option_for_a_server_with_a_private_certificate(
    home: Home, admin: IssuedKey, tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path)
    home.configure(serve={"tls_certificate": certificate, "tls_key": key})
    async with home.serving(f"{NAME}@1") as client:
        options = ["--server", f"https://localhost:{client.base_url.port}", "--key-file", write_key(tmp_path, admin)]
        trusting = [*map(str, options), "--ca", str(certificate), "promote", f"{NAME}@2"]
        result = await asyncio.to_thread(CliRunner().invoke, group, trusting)
        assert "tuned@2 (merged) is served" in result.output
        result = await asyncio.to_thread(CliRunner().invoke, group, [*map(str, options), "status"])
        assert isinstance(error_of(result), ServerNotRunningError)


def test_key_is_not_sent_to_an_unsafe_url(admin: IssuedKey, tmp_path: Path) -> None:
    for url in ("http://192.0.2.1:8000", "http://models.example.org", "ftp://x", "x", "https://u@h"):
        with pytest.raises(SettingsError):
            ServerAddress.with_key(url, write_key(tmp_path, admin), None)


def test_server_address_repr_does_not_contain_the_key(admin: IssuedKey, tmp_path: Path) -> None:
    address = ServerAddress.with_key("https://h", write_key(tmp_path, admin), None)
    assert address.key == admin.secret
    assert admin.secret not in repr(address)


def test_local_only_commands_are_rejected_with_the_server_option(home: Home) -> None:
    result = CliRunner().invoke(group, ["--server", "https://h", "add", NAME])
    assert result.exit_code == 2
    assert "--server works only with status, jobs, promote" in result.output
