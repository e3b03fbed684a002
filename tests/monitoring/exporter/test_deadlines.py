"""Tests that the exporter shows the expiry of the certificate and keys and the time of the newest backup."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine as Store

from monitoring.exporter.deadlines import DeadlineMetrics
from serving.access.keyring import Keyring
from serving.backup.archive import Archive, Snapshot
from svc.identity.actor import Actor
from svc.identity.principal import Scope
from svc.store.audit import Action, AuditEntry, record_event
from tests.new_store import new_store
from tests.serving.certificates import make_certificate

DAY_S = 86_400
CERTIFICATE, KEY, BACKUP = (
    "svc_certificate_expiry_timestamp_seconds",
    "svc_key_expiry_timestamp_seconds",
    "svc_backup_timestamp_seconds",
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "home")


def shown(store: Store, family: str, certificate: Path | None = None, **labels: str) -> float | None:
    metrics = CollectorRegistry()
    metrics.register(DeadlineMetrics(store, certificate))
    return metrics.get_sample_value(family, labels)


def back_up(store: Store, folder: Path, snapshot: str | None) -> None:
    record_event(store, AuditEntry(Action.BACKUP, str(folder), Actor.local()))
    if snapshot:
        made = Snapshot(name=snapshot, release="1", versions=(), files=())
        archive = Archive(folder)
        archive.folder(made).mkdir(parents=True)
        archive.finish(made)


def test_certificate_expiry_is_exported(store: Store, tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path)
    assert shown(store, CERTIFICATE, certificate) == pytest.approx(time.time() + DAY_S, abs=60)


def test_unreadable_certificate_has_no_expiry_metric(store: Store, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("no certificate")
    assert shown(store, CERTIFICATE, damaged) is None
    assert shown(store, CERTIFICATE, tmp_path / "missing.pem") is None


def test_backup_time_is_exported_even_if_the_certificate_is_unreadable(store: Store, tmp_path: Path) -> None:
    back_up(store, tmp_path / "backups", "20260102T030000.000Z")
    assert shown(store, BACKUP, tmp_path / "missing.pem") is not None


def test_key_expiry_is_exported_while_the_key_is_usable(store: Store) -> None:
    keyring = Keyring(store, Actor.local())
    until = datetime.now(UTC) + timedelta(days=3)
    expiring, revoked = (
        keyring.create(frozenset({Scope.INFER}), name=name, expires_at=until).key.id for name in ("ci", "old")
    )
    forever = keyring.create(frozenset({Scope.INFER})).key.id
    keyring.revoke(revoked)
    assert shown(store, KEY, key_id=expiring) == pytest.approx(until.timestamp(), abs=1)
    assert shown(store, KEY, key_id=revoked) is None
    assert shown(store, KEY, key_id=forever) is None


def test_time_of_the_newest_finished_backup_is_exported_even_if_a_later_backup_was_interrupted(
    store: Store, tmp_path: Path
) -> None:
    back_up(store, tmp_path / "backups", "20260101T030000.000Z")
    back_up(store, tmp_path / "backups", "20260102T030000.500Z")
    back_up(store, tmp_path / "backups", None)
    assert shown(store, BACKUP) == datetime(2026, 1, 2, 3, 0, 0, 500_000, tzinfo=UTC).timestamp()


def test_backup_start_time_is_exported_if_the_backup_folder_is_on_a_different_machine(
    store: Store, tmp_path: Path
) -> None:
    back_up(store, tmp_path / "of-another-machine", None)
    assert shown(store, BACKUP) == pytest.approx(time.time(), abs=60)


def test_backup_time_is_unchanged_by_later_audit_events_of_other_kinds(store: Store, tmp_path: Path) -> None:
    back_up(store, tmp_path / "backups", "20260102T030000.000Z")
    record_event(store, AuditEntry(Action.COLLECT, str(tmp_path / "home"), Actor.local()))
    assert shown(store, BACKUP) == datetime(2026, 1, 2, 3, tzinfo=UTC).timestamp()


def test_no_backup_time_is_exported_if_no_backup_exists(store: Store) -> None:
    assert shown(store, BACKUP) is None
