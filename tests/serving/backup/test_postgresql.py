"""Tests that the backup of a home whose store is in PostgreSQL leaves the database to its own tools, and says so."""

import json
from pathlib import Path

import pytest

from svc.errors import RefusedError
from svc.settings.settings import Settings
from svc.store.audit import read_events
from svc.store.database import open_store
from svc.store.desired import change_desired
from svc.version import Format, Target
from tests.command_line import Svc
from tests.postgresql import SHARED, PostgresServer
from tests.serving.backup.conftest import UsedHome

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(used: UsedHome, postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings of a used home whose store is in PostgreSQL, which `svc` reads too."""
    postgresql.empty()
    store = postgresql.settings(SHARED)
    assert store.url is not None
    monkeypatch.setenv("SVC_STORE__URL", store.url.get_secret_value())
    monkeypatch.setenv("SVC_HOME", str(used.settings.home))
    return Settings(home=used.settings.home, store=store)


def test_backup_includes_the_versions_in_use_and_says_to_back_up_postgresql_separately(
    svc: Svc, used: UsedHome, settings: Settings
) -> None:
    version = used.publish()
    store = open_store(settings)
    change_desired(store, None, Target(version, Format.ADAPTER), None)
    result = svc("backup", "backups", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["versions"] == [str(version)]
    assert json.loads(result.out)["store"].endswith(f"/{SHARED}")
    assert "pg_dump" in result.err
    assert [event.action for event in read_events(store, newest=9)] == ["backup"]
    store.dispose()


def test_restore_does_not_change_postgresql_and_says_to_run_pg_restore(
    svc: Svc, used: UsedHome, settings: Settings, tmp_path: Path
) -> None:
    version = used.publish()
    assert svc("backup", "backups").code == 0
    result = svc("--home", "again", "restore", "backups")
    assert (result.code, "pg_restore" in result.err) == (0, True)
    assert (tmp_path / "again" / "models" / version.name / str(version.number)).is_dir()
    assert not (tmp_path / "again" / "svc.db").exists()


def test_revoke_keys_option_is_refused_if_the_keys_are_in_postgresql(
    svc: Svc, used: UsedHome, settings: Settings
) -> None:
    used.publish()
    assert svc("backup", "backups").code == 0
    result = svc("--home", "again", "restore", "backups", "--revoke-keys")
    assert result.code == RefusedError.exit_code
    assert "svc keys revoke" in result.err


def test_restore_warns_if_the_restored_database_is_unused_because_store_url_is_set(
    svc: Svc, used: UsedHome, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("SVC_STORE__URL")
        assert svc("backup", "backups").code == 0
    result = svc("--home", "again", "restore", "backups", "--yes")
    assert (result.code, "is not used, because store.url is set" in result.err) == (0, True)


def test_restore_with_the_revoke_keys_option_is_refused_if_store_url_is_set(
    svc: Svc, used: UsedHome, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("SVC_STORE__URL")
        assert svc("backup", "backups").code == 0
    result = svc("--home", "again", "restore", "backups", "--revoke-keys")
    assert (result.code, "store.url" in result.err) == (RefusedError.exit_code, True)
