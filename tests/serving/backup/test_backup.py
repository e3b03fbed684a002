"""Tests that a snapshot is complete or absent, has all that databases name, and copies no version twice."""

import os
import sqlite3
import stat
from pathlib import Path

import pytest

from serving.backup.archive import Archive
from serving.backup.backup import Backup
from svc.errors import BusyError, DiskSpaceError, IntegrityError
from svc.files.lock import hold_lock
from svc.registry.housekeeping import remove_version
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.version import Alias, Format
from tests.serving.backup.conftest import NAME, BackUp, RestoreAs, UsedHome, progress

pytestmark = pytest.mark.slow


def test_backed_up_home_can_be_restored(used: UsedHome, back_up: BackUp, restore_as: RestoreAs) -> None:
    first, second = used.publish(), used.publish()
    used.promote(first)
    assert back_up().snapshot.versions == (str(first), str(second))
    registry = Registry.of(restore_as("again"))
    assert registry.versions() == [first, second]
    assert registry.tracking.aliases(NAME) == {Alias.PRODUCTION: first}
    for version in (first, second):
        registry.verify(version, Format.MERGED)
        assert registry.manifest(version) == used.registry.manifest(version)


def test_unchanged_version_is_copied_only_once(used: UsedHome, back_up: BackUp) -> None:
    first = used.publish()
    assert back_up().copied == (str(first),)
    second = used.publish()
    made = back_up()
    assert made.copied == (str(second),)
    assert made.snapshot.versions == (str(first), str(second))


def test_backup_files_are_copies_rather_than_hard_links(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    version = used.publish()
    back_up()
    weights = Path("merged") / "model.safetensors"
    assert not os.path.samefile(used.registry.folder(version) / weights, archive.version(version) / weights)


def test_backup_is_not_readable_by_other_users(
    used: UsedHome, archive: Archive, tmp_path: Path, back_up: BackUp
) -> None:
    used.publish()
    key = used.settings.home / "admin.key"
    key.write_text("secret")
    key.chmod(0o600)
    made = back_up().snapshot
    assert stat.S_IMODE((tmp_path / "backups").stat().st_mode) == 0o700
    for name in ("svc.db", "mlflow.db", "files/admin.key"):
        assert stat.S_IMODE((archive.folder(made) / name).stat().st_mode) == 0o600


def test_regenerable_files_are_excluded_from_backups(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    home = used.settings.home
    for path in (
        "logs/engine-0.log",
        "cache/vllm/kernel",
        "engines/0/engine.json",
        "runs/tickets-1/adapter/a",
        "x.lock",
    ):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text("x")
    (home / "svc.yaml").write_text("{}")
    own = archive.folder(back_up().snapshot)
    files = {path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()}
    assert files == {"svc.db", "mlflow.db", "files/svc.yaml", "snapshot.json"}


def test_snapshot_is_complete_without_a_version_that_was_removed_before_being_copied(
    used: UsedHome, back_up: BackUp, restore_as: RestoreAs
) -> None:
    first, second, third = used.publish(), used.publish(), used.publish()
    used.promote(first)
    tries = list[int]()

    def promote_others_and_remove(total: int) -> None:
        tries.append(total)
        if len(tries) == 1:  # the databases that name the first one have been copied
            used.promote(second)
            used.promote(third)
            remove_version(used.registry, used.store, first)

    made = back_up(progress=progress(promote_others_and_remove))
    assert len(tries) == 2
    assert (made.snapshot.versions, made.snapshot.left_out) == ((str(second), str(third)), {})
    assert Registry.of(restore_as("again")).resolve(NAME) == third


def test_version_registered_during_a_backup_is_in_the_next_backup(used: UsedHome, back_up: BackUp) -> None:
    first = used.publish()
    assert back_up(progress=progress(lambda total: used.publish())).snapshot.versions == (str(first),)
    assert len(back_up().snapshot.versions) == 2


def test_missing_required_version_is_reported_and_the_rest_is_backed_up(used: UsedHome, back_up: BackUp) -> None:
    first, second = used.publish(), used.publish()
    used.promote(first)
    used.registry.folder(first).rename(used.settings.home / "elsewhere")
    made = back_up().snapshot
    assert made.versions == (str(second),)
    assert made.left_out == {str(first): "needed but missing from the home"}


def test_damaged_version_is_reported_and_the_rest_is_backed_up(
    used: UsedHome, archive: Archive, back_up: BackUp
) -> None:
    first, second = used.publish(), used.publish()
    _overwrite(used.registry.folder(first) / "merged" / "config.json")
    made = back_up().snapshot
    assert made.versions == (str(second),)
    assert "was changed after registration" in made.left_out[str(first)]
    assert not archive.version(first).exists()


def test_truncated_backup_copy_is_copied_again(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    version = used.publish()
    back_up()
    weights = archive.version(version) / "merged" / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"short")
    assert back_up().copied == (str(version),)


def test_backup_with_verification_replaces_an_altered_copy(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    version = used.publish()
    back_up()
    _overwrite(archive.version(version) / "merged" / "config.json")
    assert back_up().copied == ()
    assert back_up(verify=True).copied == (str(version),)


def test_backup_of_another_home_into_the_same_folder_is_rejected(
    used: UsedHome, archive: Archive, back_up: BackUp, tmp_path: Path
) -> None:
    version = used.publish()
    back_up()
    manifest = used.registry.folder(version) / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text("utf-8").replace('"run-1"', '"run-2"'))
    with pytest.raises(IntegrityError, match="differs from version"):
        back_up()


def test_no_snapshot_is_created_if_a_database_is_damaged(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    back_up()
    (used.settings.home / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(IntegrityError, match=r"mlflow\.db is damaged"):
        back_up()
    assert len(archive.snapshots()) == 1


def test_interrupted_snapshot_is_ignored_and_cleaned_up(used: UsedHome, archive: Archive, back_up: BackUp) -> None:
    used.publish()

    def cut_off(total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(progress=progress(cut_off))
    (archive.models.parent / "snapshots" / "20260101T000000.000Z").mkdir()  # of a killed backup
    assert archive.snapshots() == []
    back_up()
    assert len(list((archive.models.parent / "snapshots").iterdir())) == 1


def test_pruning_removes_old_snapshots_and_the_versions_that_only_they_contain(
    used: UsedHome, archive: Archive
) -> None:
    first = used.publish()
    for _ in range(2):
        Backup(used.settings, archive).run(keep=2)
    second = used.publish()
    remove_version(used.registry, used.store, first)
    for left in (True, False):
        made = Backup(used.settings, archive).run(keep=2)
        assert len(made.pruned) == 1
        assert archive.version(first).exists() == left
    assert [snapshot.versions for snapshot in archive.snapshots()] == [(str(second),)] * 2


def test_second_concurrent_backup_into_the_same_folder_is_rejected(
    used: UsedHome, archive: Archive, back_up: BackUp
) -> None:
    archive.prepare()
    with hold_lock(archive.lock, "the backup"), pytest.raises(BusyError):
        back_up()


def test_full_disk_is_reported_before_weights_are_copied(
    used: UsedHome, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    used.publish()
    monkeypatch.setattr("serving.backup.backup.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DiskSpaceError, match="not enough disk space"):
        back_up()


def test_uncommitted_rows_are_excluded_from_the_snapshot(
    used: UsedHome, back_up: BackUp, restore_as: RestoreAs
) -> None:
    with sqlite3.connect(used.settings.home / "svc.db", isolation_level=None) as writing:
        writing.execute("BEGIN IMMEDIATE")
        writing.execute("CREATE TABLE half (a)")
        back_up()
        writing.execute("ROLLBACK")
    writing.close()
    with sqlite3.connect(restore_as("again").home / "svc.db") as restored:
        assert restored.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    restored.close()


def test_snapshot_records_the_configured_mlflow_uri_and_does_not_include_mlflow_db(
    used: UsedHome, archive: Archive
) -> None:
    uri = f"sqlite:///{used.settings.home / 'mlflow.db'}"
    settings = Settings(home=used.settings.home, tracking_uri=uri)
    made = Backup(settings, archive).run(keep=1).snapshot
    assert made.tracking == uri
    assert not (archive.folder(made) / "mlflow.db").exists()


def _overwrite(path: Path) -> None:
    """Overwrite a file with the same number of different bytes. The file may be shared with other versions."""
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"x" * size)
