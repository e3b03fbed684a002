"""Tests the output of `svc store migrate`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from svc.errors import RefusedError, RegistryError, SettingsError
from svc.settings.storage import StoreSettings
from tests.command_line import Svc
from tests.filled_store import ROWS, fill
from tests.new_store import new_store
from tests.postgresql import PostgresServer

pytestmark = pytest.mark.slow

SECRET = "s3cret-pass"


@pytest.fixture
def url(postgresql: PostgresServer) -> Iterator[str]:
    """Return the URL of an empty database."""
    with postgresql.new_database() as settings:
        yield url_of(settings)


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Path:
    """Return a home whose store has rows in every table."""
    store = new_store(tmp_path / "home")
    fill(store)
    store.dispose()
    return tmp_path / "home"


def url_of(settings: StoreSettings) -> str:
    assert settings.url is not None
    return settings.url.get_secret_value()


def test_store_migration_prints_row_counts_by_table_and_the_next_steps(svc: Svc, home: Path, url: str) -> None:
    result = svc("--home", home, "store", "migrate", "--from", "sqlite", "--to", url)
    assert result.code == 0, result.err
    assert ["holdout_runs", str(ROWS)] in [line.split() for line in result.out.splitlines()]
    assert "compared each copy with the original" in result.out
    for part in ("store.url", str(home / "svc.db"), "svc.db-wal", "svc forget"):
        assert part in result.err


def test_store_migration_reports_row_counts_as_json(svc: Svc, home: Path, url: str) -> None:
    result = svc("--home", home, "store", "migrate", "--to", url, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["rows"]["requests"] == ROWS
    assert (report["replaced_texts"], report["kept"]) == (0, str(home / "svc.db"))
    assert "@" not in report["to"]


def test_audit_log_passes_verification_after_store_migration(
    svc: Svc, home: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    svc("--home", home, "store", "migrate", "--to", url)
    monkeypatch.setenv("SVC_STORE__URL", url)
    result = svc("--home", home, "audit", "--verify")
    assert result.code == 0, result.err


def test_password_of_the_target_database_is_never_printed(
    svc: Svc, home: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text(SECRET, "utf-8")
    with_password = url.replace("tests@", f"tests:{SECRET}@")
    nowhere = f"postgresql://svc:{SECRET}@127.0.0.1:1/store"
    results = [
        svc("--home", home, "store", "migrate", "--to", with_password),
        svc("--home", home, "store", "migrate", "--to", url, "--password-file", "password"),  # it is not empty
        svc("--home", home, "store", "migrate", "--to", nowhere),
        svc("--home", home, "store", "migrate", "--to", f"{with_password}@"),
        svc("--home", home, "store", "migrate", "--to", with_password, "--password-file", "password"),
    ]
    assert [result.code for result in results] == [
        0,
        RefusedError.exit_code,
        RegistryError.exit_code,
        SettingsError.exit_code,
        SettingsError.exit_code,
    ]
    assert not [result for result in results if SECRET in result.out + result.err]


def test_store_migration_is_refused_if_the_tuneserve_home_does_not_use_sqlite(
    svc: Svc, home: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVC_STORE__URL", url)
    result = svc("--home", home, "store", "migrate", "--to", url)
    assert result.code == RefusedError.exit_code
    assert "store.url is set" in result.err
