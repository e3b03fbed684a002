"""Tests that a home is restored completely or not used. Damaged, non-empty and used folders are rejected."""

from pathlib import Path

import pytest

from serving.backup.archive import Archive
from serving.backup.restore import restore_home
from svc.errors import BusyError, IntegrityError, NotFoundError, SettingsError
from svc.files.lock import hold_lock
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.version import Format
from tests.serving.backup.conftest import BackUp, RestoreAs, UsedHome, progress
from tests.svc.registry.manifests import make_manifest

pytestmark = pytest.mark.slow


def test_restore_into_a_non_empty_home_is_rejected(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    back_up()
    with pytest.raises(SettingsError, match="is not empty"):
        restore_home(archive, archive.find(None), used.settings.home)


def test_restore_into_a_home_in_use_is_rejected(archive: Archive, back_up: BackUp, tmp_path: Path) -> None:
    back_up()
    home = tmp_path / "again"
    with hold_lock(home / "serve.lock", "the home"), pytest.raises(BusyError):
        restore_home(archive, archive.find(None), home)


def test_interrupted_restore_can_be_continued(
    used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path
) -> None:
    first, second = used.publish(), used.publish()
    snapshot, home, totals = back_up().snapshot, tmp_path / "again", list[int]()

    def cut_off(count: int) -> None:
        if (home / "models" / first.name / str(first.number)).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_home(archive, snapshot, home, progress=progress(totals.append, cut_off))
    assert not (home / "svc.db").exists()
    restore_home(archive, snapshot, home, progress=progress(totals.append))
    assert Registry.of(Settings(home=home)).versions() == [first, second]
    assert totals[1] < totals[0]
    with pytest.raises(SettingsError, match="is not empty"):
        restore_home(archive, snapshot, home)


def test_snapshot_with_an_altered_database_is_rejected(archive: Archive, back_up: BackUp, tmp_path: Path) -> None:
    snapshot = back_up().snapshot
    with (archive.folder(snapshot) / "svc.db").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="older snapshot"):
        restore_home(archive, snapshot, tmp_path / "again")
    assert not (tmp_path / "again" / "svc.db").exists()


def test_restore_fails_if_a_version_in_the_backup_was_altered(
    used: UsedHome, archive: Archive, back_up: BackUp, restore_as: RestoreAs, tmp_path: Path
) -> None:
    version = used.publish()
    back_up()
    weights = archive.version(version) / "merged" / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"x" * weights.stat().st_size)
    with pytest.raises(IntegrityError):
        restore_as("again")
    assert not (tmp_path / "again" / "svc.db").exists()


def test_older_snapshot_can_be_selected(used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path) -> None:
    first = used.publish()
    older = back_up().snapshot
    used.publish()
    back_up()
    restore_home(archive, archive.find(older.name), tmp_path / "again")
    assert Registry.of(Settings(home=tmp_path / "again")).versions() == [first]
    with pytest.raises(NotFoundError, match=older.name):
        archive.find("19990101T000000.000Z")


def test_folder_that_is_not_a_backup_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no snapshot"):
        Archive(tmp_path / "nothing").find(None)


def test_versions_can_be_registered_in_a_restored_home(used: UsedHome, back_up: BackUp, restore_as: RestoreAs) -> None:
    first = used.publish()
    back_up()
    registry = Registry.of(restore_as("again"))
    second = registry.publish(first.name, used.run, used.content, make_manifest).id
    assert second.number == first.number + 1
    registry.verify(second, Format.MERGED)
