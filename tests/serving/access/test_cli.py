"""Tests `svc keys` and `svc usage` as commands."""

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from serving.access.authenticator import Authenticator, InvalidKeyError
from serving.access.usage import Usage, UsageOf, add_usage, hour_of
from svc.errors import NotFoundError, RefusedError, RegistryError, SettingsError
from svc.identity.key_secret import key_id_of
from svc.identity.principal import Limits, Scope
from svc.store.audit import read_events
from svc.store.database import open_database
from svc.store.keys import read_keys
from tests.command_line import Svc
from tests.postgresql import SHARED, PostgresServer


def create(svc: Svc, *options: str) -> dict[str, Any]:
    """Create a key and return the command's JSON output."""
    result = svc("keys", "create", *options, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def authenticator(home: Path = Path(".svc")) -> Authenticator:
    """Return an authenticator that has just read the keys."""
    made = Authenticator(open_database(home))
    made.refresh()
    return made


def test_first_admin_key_is_created_locally_in_a_home_folder_that_only_the_owner_can_access(
    svc: Svc, tmp_path: Path
) -> None:
    result = svc("keys", "create", "--scope", "admin")
    assert result.code == 0
    assert authenticator().grant(result.out.strip()).principal.may(Scope.JOBS)
    assert (tmp_path / ".svc").stat().st_mode & 0o077 == 0
    assert (tmp_path / ".svc" / "svc.db").stat().st_mode & 0o077 == 0


def test_create_command_prints_only_the_secret_to_piped_standard_output(svc: Svc) -> None:
    result = svc("keys", "create")
    assert key_id_of(result.out.removesuffix("\n")) is not None
    assert "shown only once" in result.err
    assert result.out.strip() not in result.err


def test_key_created_without_options_is_a_client_key(svc: Svc) -> None:
    made = create(svc)
    principal = authenticator().grant(made["secret"]).principal
    assert (principal.scopes, principal.models) == (frozenset({Scope.INFER, Scope.FEEDBACK}), None)
    assert (principal.limits, principal.weight) == (Limits(), 1)


def test_created_key_has_the_properties_given_as_options(svc: Svc) -> None:
    options = ["--name", "ci", "--scope", "infer", "--scope", "metrics", "--model", "tickets", "--model", "reviews"]
    limits = ["--requests-per-minute", "60", "--tokens-in-per-minute", "1000", "--tokens-out-per-minute", "500"]
    made = create(svc, *options, *limits, "--concurrent", "4", "--tokens-per-day", "10000", "--weight", "3")
    principal = authenticator().grant(made["secret"]).principal
    assert (principal.key_id, principal.name, principal.weight) == (made["key_id"], "ci", 3)
    assert principal.scopes == {Scope.INFER, Scope.METRICS}
    assert principal.models == frozenset({"tickets", "reviews"})
    assert principal.limits == Limits(60, 1000, 500, 4, 10_000)


@pytest.mark.parametrize(
    "when", [lambda: "90d", lambda: (datetime.now(UTC) + timedelta(days=90)).isoformat()], ids=["span", "time"]
)
def test_key_expires_at_the_given_time(svc: Svc, when: Callable[[], str]) -> None:
    ends = datetime.fromisoformat(create(svc, "--expires", when())["expires_at"])
    assert abs(ends - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "options", [["--scope", "root"], ["--expires", "soon"], ["--concurrent", "0"], ["--weight", "0"]]
)
def test_invalid_key_option_is_a_usage_error(svc: Svc, options: list[str]) -> None:
    result = svc("keys", "create", *options)
    assert result.code == 2
    assert options[0] in result.err


def test_key_with_an_expiry_in_the_past_is_rejected(svc: Svc) -> None:
    assert svc("keys", "create", "--expires", "2020-01-01").code == SettingsError.exit_code


@pytest.mark.slow
def test_keys_are_listed_without_secrets(svc: Svc) -> None:
    made = create(svc, "--name", "ci", "--model", "tickets", "--concurrent", "4")
    plain, rows = svc("keys", "list"), svc("keys", "list", "--json")
    assert "ci" in plain.out and made["key_id"] in plain.out and "concurrent 4" in plain.out
    (row,) = json.loads(rows.out)
    assert row == {key: value for key, value in made.items() if key != "secret"} | {"last_used": None}
    (key,) = read_keys(open_database(Path(".svc")))
    for ended in (plain, rows):
        assert made["secret"][12:] not in ended.out + ended.err
        assert key.hash not in ended.out + ended.err


def test_empty_key_list_says_how_to_create_the_first_key(svc: Svc) -> None:
    assert "svc keys create --scope admin" in svc("keys", "list").out


@pytest.mark.slow
def test_key_list_shows_when_a_key_was_last_used(svc: Svc) -> None:
    hour = hour_of(datetime.now(UTC))
    add_usage(open_database(Path(".svc")), {UsageOf(hour, create(svc)["key_id"], "tickets"): Usage(1, 1, 1)})
    assert json.loads(svc("keys", "list", "--json").out)[0]["last_used"] == hour.isoformat()


@pytest.mark.slow
def test_revoked_key_is_rejected_and_appears_in_the_key_list_only_with_the_all_option(svc: Svc) -> None:
    made = create(svc, "--name", "ci")
    result = svc("keys", "revoke", "ci", "--yes", "--reason", "leaked")
    assert "has been revoked" in result.out
    with pytest.raises(InvalidKeyError, match="has been revoked"):
        authenticator().grant(made["secret"])
    assert json.loads(svc("keys", "list", "--json").out) == []
    assert json.loads(svc("keys", "list", "--all", "--json").out)[0]["state"] == "revoked"
    assert read_events(open_database(Path(".svc")), newest=1)[0].reason == "leaked"
    assert svc("keys", "revoke", made["key_id"], "--yes").code == RefusedError.exit_code


def test_error_names_the_unknown_key(svc: Svc) -> None:
    result = svc("keys", "revoke", "nobody", "--yes")
    assert result.code == NotFoundError.exit_code
    assert "'nobody'" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["revoke", "rotate"])
def test_confirmation_is_required_if_a_secret_would_become_invalid_immediately(
    svc: Svc, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create(svc, "--name", "ci")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    result = svc("keys", command, "ci")
    assert result.code == 130
    assert "Continue?" in result.err
    assert authenticator().grant(made["secret"]).principal


@pytest.mark.slow
@pytest.mark.parametrize("command", ["revoke", "rotate"])
def test_key_command_with_the_json_option_fails_without_the_yes_option_and_changes_nothing(
    svc: Svc, command: str
) -> None:
    made = create(svc, "--name", "ci")
    result = svc("keys", command, "ci", "--json")
    assert result.code == 2
    assert "--yes" in result.err
    assert authenticator().grant(made["secret"]).principal


@pytest.mark.slow
def test_rotation_creates_a_new_secret_and_invalidates_the_old_one(svc: Svc) -> None:
    made = create(svc, "--name", "ci")
    rotated = svc("keys", "rotate", "ci", "--yes").out.strip()
    assert authenticator().grant(rotated).principal.key_id == made["key_id"]
    with pytest.raises(InvalidKeyError):
        authenticator().grant(made["secret"])


@pytest.mark.slow
def test_rotation_with_a_grace_period_needs_no_confirmation_and_keeps_both_secrets_valid(svc: Svc) -> None:
    made = create(svc, "--name", "ci")
    result = svc("keys", "rotate", "ci", "--grace", "1h")
    assert "the old secret stays valid until" in result.err
    for secret in (made["secret"], result.out.strip()):
        assert authenticator().grant(secret).principal.key_id == made["key_id"]


@pytest.fixture
def used(svc: Svc) -> str:
    """Return the id of a key that used two models, in a store that also has usage of one model without a key."""
    key_id: str = create(svc, "--name", "ci")["key_id"]
    hour = hour_of(datetime.now(UTC))
    add_usage(
        open_database(Path(".svc")),
        {
            UsageOf(hour, key_id, "tickets"): Usage(3, 3000, 500),
            UsageOf(hour, key_id, "reviews"): Usage(1, 10, 5),
            UsageOf(hour - timedelta(days=2), "", "tickets"): Usage(7, 70, 7),
        },
    )
    return key_id


def test_usage_is_shown_separately_for_each_key_and_model(svc: Svc, used: str) -> None:
    rows = json.loads(svc("usage", "--json").out)
    assert rows[0] == {
        "key_id": used, "name": "ci", "model": "tickets", "requests": 3, "tokens_in": 3000, "tokens_out": 500
    }  # fmt: skip
    assert [(row["key_id"], row["model"]) for row in rows] == [(used, "tickets"), (None, "tickets"), (used, "reviews")]


def test_usage_since_a_given_day_excludes_earlier_usage(svc: Svc, used: str) -> None:
    assert {row["key_id"] for row in json.loads(svc("usage", "--since", "1d", "--json").out)} == {used}


def test_usage_table_has_a_total_row(svc: Svc, used: str) -> None:
    last = svc("usage").out.splitlines()[-1].split()
    assert last == ["all", "11", "3,080", "512"]


def test_usage_output_is_valid_csv(svc: Svc, used: str) -> None:
    rows = list(csv.DictReader(io.StringIO(svc("usage", "--csv").out)))
    assert [row["tokens_in"] for row in rows] == ["3000", "70", "10"]
    assert rows[1]["key_id"] == ""


def test_usage_command_succeeds_when_there_is_no_usage(svc: Svc) -> None:
    result = svc("usage")
    assert (result.code, "no usage since" in result.out) == (0, True)


@pytest.fixture
def in_postgresql(postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a store in PostgreSQL that `svc` finds by its settings."""
    url = postgresql.settings(SHARED).url
    assert url is not None
    monkeypatch.setenv("SVC_STORE__URL", url.get_secret_value())
    return postgresql.empty()


def test_keys_are_created_in_the_configured_database(svc: Svc, in_postgresql: Store) -> None:
    made = create(svc, "--name", "ci")
    assert [key.id for key in read_keys(in_postgresql)] == [made["key_id"]]
    assert not Path(".svc", "svc.db").exists()


@pytest.mark.slow
def test_unavailable_database_is_reported_without_a_traceback(
    svc: Svc, in_postgresql: Store, postgresql: PostgresServer
) -> None:
    postgresql.stop()
    try:
        result = svc("keys", "list")
    finally:
        postgresql.start()
    assert result.code == RegistryError.exit_code
    assert result.err.startswith("error: the store at ")
    assert "is not responding" in result.err
    assert "Traceback" not in result.err
