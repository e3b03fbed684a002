"""Tests that a restore reactivates no key known to be revoked, and asks for confirmation of all other keys."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.access.keyring import IssuedKey, Keyring
from serving.access.usage import Usage, UsageOf, add_usage
from serving.backup.archive import STORE_FILE, Archive
from serving.backup.restore import restore_home
from svc.errors import RefusedError
from svc.identity.actor import Actor
from svc.identity.principal import Scope
from svc.settings.settings import Settings
from svc.store.audit import read_events, verify_chain
from svc.store.database import open_database
from svc.store.keys import read_keys
from tests.command_line import Svc
from tests.serving.backup.conftest import BackUp, UsedHome


def create(used: UsedHome, *names: str) -> list[IssuedKey]:
    keyring = Keyring(used.store, Actor.local())
    return [keyring.create(frozenset({Scope.INFER}), name=name) for name in names]


def states(home: Path) -> dict[str, bool]:
    """Return whether each key is valid, keyed by name."""
    return {key.principal.name: key.usable(datetime.now(UTC)) for key in read_keys(open_database(home))}


@pytest.mark.slow
def test_restored_key_stays_revoked_if_revoked_in_any_newer_snapshot(
    used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path
) -> None:
    create(used, "stolen", "retired", "fine")
    keyring = Keyring(used.store, Actor.local())
    oldest = back_up().snapshot
    keyring.revoke("stolen")
    second = back_up().snapshot
    keyring.revoke("retired")
    third = back_up().snapshot
    for name in (oldest.name, second.name):
        restore_home(archive, archive.find(name), tmp_path / name)
        assert states(tmp_path / name) == {"stolen": False, "retired": False, "fine": True}
    store = open_database(tmp_path / oldest.name)
    revoked = [event for event in read_events(store, newest=9) if event.action == "key.revoke"]
    assert sorted(str(event.reason) for event in revoked) == [
        f"revoked in snapshot {second.name}",
        f"revoked in snapshot {third.name}",
    ]
    assert verify_chain(store).fault is None


@pytest.mark.slow
def test_restored_key_stays_revoked_even_if_a_snapshot_older_than_its_revocation_is_damaged(
    used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path
) -> None:
    create(used, "stolen", "fine")
    oldest, damaged = back_up().snapshot, back_up().snapshot
    Keyring(used.store, Actor.local()).revoke("stolen")
    back_up()
    (archive.folder(damaged) / STORE_FILE).write_bytes(b"damaged")
    restore_home(archive, archive.find(oldest.name), tmp_path / "again")
    assert states(tmp_path / "again") == {"stolen": False, "fine": True}


@pytest.mark.slow
def test_reading_newer_snapshots_does_not_change_the_archive(
    used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path
) -> None:
    create(used, "one")
    first, second = back_up().snapshot, back_up().snapshot
    folder = archive.folder(second)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    restore_home(archive, archive.find(first.name), tmp_path / "again")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_store_is_not_restored_if_the_keys_are_not_confirmed(
    used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path
) -> None:
    create(used, "one")
    used.publish()
    back_up()
    home = tmp_path / "again"

    def decline(keys: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_home(archive, archive.find(None), home, on_keys=decline)
    assert [path.name for path in home.iterdir()] == ["serve.lock"]
    restore_home(archive, archive.find(None), home)
    assert {path.name for path in home.iterdir()} == {"models", "mlflow.db", "serve.lock", "svc.db"}
    assert states(home) == {"one": True}


@pytest.mark.slow
def test_restoring_a_backup_with_valid_keys_is_refused_if_there_is_no_terminal_for_confirmation(
    svc: Svc, used: UsedHome, tmp_path: Path
) -> None:
    (issued,) = create(used, "laptop")
    add_usage(used.store, {UsageOf(datetime(2026, 1, 2, 3, tzinfo=UTC), issued.key.id, "tickets"): Usage(1, 2, 3)})
    svc("--home", used.settings.home, "backup", "backups")
    for options in ([], ["--json"]):
        result = svc("--home", "again", "restore", "backups", *options)
        assert result.code == RefusedError.exit_code
        assert f"laptop ({issued.key.id})" in result.err and "--revoke-keys" in result.err
        assert not (tmp_path / "again" / "svc.db").exists()
    shown = next(line for line in result.err.splitlines() if "infer" in line)
    assert issued.key.id in shown and "2026-01-02 03:00" in shown


@pytest.mark.slow
def test_restore_with_the_yes_option_needs_no_confirmation_of_the_keys(
    svc: Svc, used: UsedHome, tmp_path: Path
) -> None:
    create(used, "laptop", "stolen")
    svc("--home", used.settings.home, "backup", "backups")
    name = json.loads(svc("restore", "backups", "--list", "--json").out)[0]["name"]
    Keyring(used.store, Actor.local()).revoke("stolen")
    Keyring(used.store, Actor.local()).rotate("laptop")
    svc("--home", used.settings.home, "backup", "backups")
    result = svc("--home", "again", "restore", "backups", "--snapshot", name, "--yes", "--json")
    assert result.code == 0, result.err
    keys = json.loads(result.out)["keys"]
    assert [(key["name"], key["rotated_later"]) for key in keys["valid"]] == [("laptop", True)]
    assert [key["name"] for key in keys["revoked"]] == ["stolen"]
    assert "revoked key stolen" in result.err and "its secret was rotated later" in result.err
    assert states(tmp_path / "again") == {"laptop": True, "stolen": False}


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y", "n"])
def test_restore_asks_for_confirmation_on_a_terminal(
    svc: Svc, used: UsedHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    create(used, "laptop")
    svc("--home", used.settings.home, "backup", "backups")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdin, "readline", lambda *_: f"{answer}\n")
    result = svc("--home", "again", "restore", "backups")
    assert "Continue?" in result.err
    assert (result.code == 0, (tmp_path / "again" / "svc.db").exists()) == ((answer == "y"),) * 2


@pytest.mark.slow
def test_restore_with_the_revoke_keys_option_revokes_every_restored_key(
    svc: Svc, used: UsedHome, tmp_path: Path
) -> None:
    create(used, "laptop", "phone")
    svc("--home", used.settings.home, "backup", "backups")
    result = svc("--home", "again", "restore", "backups", "--revoke-keys")
    assert result.code == 0, result.err
    assert states(tmp_path / "again") == {"laptop": False, "phone": False}
    events = read_events(open_database(tmp_path / "again"), newest=9)
    assert [event.reason for event in events if event.action == "key.revoke"] == ["svc restore --revoke-keys"] * 2
    Keyring(open_database(tmp_path / "again"), Actor.local()).create(frozenset({Scope.INFER}), name="laptop")
    assert len(read_keys(open_database(tmp_path / "again"))) == 3


@pytest.mark.slow
def test_restore_warns_about_a_newer_snapshot_even_if_the_store_in_that_snapshot_is_unreadable(
    svc: Svc, used: UsedHome, tmp_path: Path
) -> None:
    create(used, "laptop")
    svc("--home", used.settings.home, "backup", "backups")
    svc("--home", used.settings.home, "backup", "backups")
    first, second = (row["name"] for row in json.loads(svc("restore", "backups", "--list", "--json").out))
    (tmp_path / "backups" / "snapshots" / second / "svc.db").write_bytes(b"x" * 5000)
    result = svc("--home", "again", "restore", "backups", "--snapshot", first, "--yes")
    assert result.code == 0, result.err
    assert f"the newer snapshot {second}" in result.err
    assert Settings(home=tmp_path / "again").home.is_dir()
